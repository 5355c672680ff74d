"""
The whole algorithm in one file, without TRL: constrained distillation of the embedded demo models.

    python examples/minimal_loop.py --steps 100

Read it from `train` on. It is for reading: `ConstrainedDistillTrainer` adds everything that a real run needs.
Paper: https://huggingface.co/papers/2509.22921.
"""

import argparse

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp.tasks.arithmetic import demo_model_path, final_answer_reward, load_problems


COST_LIMIT = 0.25  # d, in nats per token
NARROWING = 0.3  # share of the steps in which the limit comes down to d from where the student is
PENALTY = 20.0  # n
VIOLATION_COEF = 0.1  # of the differentiated divergence, on rollouts outside the limit
UNREWARDED_COEF = 1.0  # and where the reward is silent; 0 leaves the student alone with its reward inside the limit
LEAST_WEIGHT = 0.3  # of the part where the reward is silent: a right answer does not say by what steps
GROUP = 8  # G, rollouts per prompt


def rollout(student, tokenizer, prompts, max_new_tokens=40):
    """G rollouts of each prompt. Token ids (B, P + T), attention mask (B, P + T) and completion mask (B, T)."""
    inputs = tokenizer([prompt for prompt in prompts for _ in range(GROUP)], padding=True, return_tensors="pt")
    input_ids = student.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, top_k=0)
    completion_ids = input_ids[:, inputs["input_ids"].size(1) :]
    ended = (completion_ids == tokenizer.eos_token_id).cumsum(1)
    mask = (ended == 0) | ((ended == 1) & (completion_ids == tokenizer.eos_token_id))  # EOS is the last token
    return input_ids, torch.cat([inputs["attention_mask"], mask.long()], dim=1), mask


def completion_logps(model, input_ids, attention_mask, length):
    """Log-probabilities (B, T, V) of the whole vocabulary at each completion token."""
    logits = model(input_ids, attention_mask=attention_mask).logits[:, -length - 1 : -1]
    return F.log_softmax(logits.float(), dim=-1)


def advantages_and_weights(rewards, cost, mask, limit):
    """Feasibility first, then reward, then the teacher. (B,), (B,), (B, T) to advantages (B,) and weights (B, T)."""
    feasible = (cost <= limit).view(-1, GROUP)
    grouped_rewards, grouped_cost = rewards.view(-1, GROUP), cost.view(-1, GROUP)
    utility = torch.empty_like(grouped_cost)
    for group in range(len(utility)):
        inside = feasible[group]
        z = torch.zeros(GROUP)
        if inside.sum() > 1:  # the reward, standardised among the feasible rollouts: it keeps its voice
            own = grouped_rewards[group][inside]
            z[inside] = (own - own.mean()) / (own.std() + 1e-4)
        worst = z.min().clamp(max=0)
        utility[group] = torch.where(inside, z, worst - 1 - grouped_cost[group].clamp(max=PENALTY) / PENALTY)
    advantages = (utility - utility.mean(1, keepdim=True)).flatten()
    # Imitate outside the budget, and as much as the group fails: what did better than it, inside d, the least, and less
    # the further outside.
    success = grouped_rewards.mean(1, keepdim=True)  # (B / G, 1), of rewards 0 and 1
    silence = torch.where((grouped_cost <= COST_LIMIT) & (grouped_rewards > success), 0.0, 1 - success)
    silence = silence.clamp(min=LEAST_WEIGHT) * COST_LIMIT / grouped_cost.clamp(min=COST_LIMIT)
    weights = (VIOLATION_COEF * ~feasible + UNREWARDED_COEF * silence).flatten().unsqueeze(1) * mask
    return advantages, weights


def train(student, teacher, tokenizer, steps, learning_rate=3e-4, prompts_per_step=16):
    problems = load_problems(steps * prompts_per_step, "train", seed=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        batch = problems[step * prompts_per_step : (step + 1) * prompts_per_step]
        with torch.no_grad():
            input_ids, attention_mask, mask = rollout(student, tokenizer, batch["prompt"])
            length = mask.size(1)
            teacher_logps = completion_logps(teacher, input_ids, attention_mask, length)
        texts = tokenizer.batch_decode(input_ids[:, -length:] * mask, skip_special_tokens=True)
        answers = [answer for answer in batch["answer"] for _ in range(GROUP)]
        rewards = torch.tensor(final_answer_reward(texts, answers))

        # One forward pass serves the costs, the policy loss and the divergence loss.
        student_logps = completion_logps(student, input_ids, attention_mask, length)
        costs = (student_logps.exp() * (student_logps - teacher_logps)).sum(-1)  # c_t = KL(π‖μ), (B, T), nats
        cost = (costs.detach() * mask).sum(1) / mask.sum(1)  # C(y), the mean over the rollout, (B,)
        if step == 0:
            start = max(cost.quantile(0.9).item(), COST_LIMIT)
        limit = max(start + (COST_LIMIT - start) * step / (NARROWING * steps), COST_LIMIT)
        advantages, weights = advantages_and_weights(rewards, cost, mask, limit)

        token_logps = student_logps.gather(-1, input_ids[:, -length:, None]).squeeze(-1)  # (B, T)
        # On-policy, so the importance ratio is 1 and its gradient is that of log π.
        policy_loss = -(torch.exp(token_logps - token_logps.detach()) * advantages[:, None] * mask).sum() / mask.sum()
        distill_loss = (weights * costs).sum() / mask.sum()
        optimizer.zero_grad()
        (policy_loss + distill_loss).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

        if step % 10 == 0 or step == steps - 1:
            print(
                f"step {step:3d}  reward {rewards.mean():.3f}  cost {cost.mean():.3f}/{COST_LIMIT}  "
                f"satisfied {(cost <= COST_LIMIT).float().mean():.3f}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    student = AutoModelForCausalLM.from_pretrained(demo_model_path("student"))
    teacher = AutoModelForCausalLM.from_pretrained(demo_model_path("teacher")).eval()
    train(student, teacher, tokenizer, arguments.steps)


if __name__ == "__main__":
    main()
