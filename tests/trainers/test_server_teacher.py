"""Training with the teacher behind a server: the same numbers as with the teacher in this process, or a clear error."""

import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
from fake_server import KEY, fail_first, serving
from fake_vllm import FakeServer
from helpers import (
    VOCAB,
    capture_rollouts,
    history,
    loss_and_gradients,
    make_model,
    make_rows,
    make_scripted_trainer,
    make_teacher,
    make_tokenizer,
    metrics,
    micro_batches,
    random_completions,
    relative_error,
    save_model,
    weights,
)
from transformers import TrainerCallback

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, LagrangianDistillTrainer, MiniLLMDistillTrainer
from trl_cmdp.teachers import RemoteTeacher, TeacherServerError


ROLLOUTS = random_completions(8)
LOG_PROBS_ONLY = {"cost": "log_ratio", "violation_distill_coef": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), make_teacher(), make_tokenizer())


@pytest.fixture
def exact_server(folder):
    with serving(FakeServer(make_teacher().eval(), folder, key=KEY)) as server:
        yield server


@pytest.fixture
def completion_server(folder):
    with serving(FakeServer(make_teacher().eval(), folder, "v1/completions")) as server:
        yield server


def build(tmp_path, server, trainer_class=ConstrainedDistillTrainer, **kwargs):
    """Trainer on scripted rollouts. Without a server the same teacher is in this process."""
    settings = {"teacher_model_server_timeout": 5, "teacher_model_server_max_wait": 2}
    if server is not None:
        settings |= {
            "teacher_model": None,
            "teacher_model_server_url": server.url,
            "teacher_model_server_api_key": server.key,
        }
    return make_scripted_trainer(tmp_path, trainer_class, **{**settings, **kwargs})


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        (ConstrainedDistillTrainer, {}),
        (ConstrainedDistillTrainer, {"teacher_hidden_memory_mb": 1e-6, "temperature": 0.7, "teacher_beta": 0.5}),
        (ConstrainedDistillTrainer, {"cost": "teacher_nll", "cost_scope": "worst_prefix", "cost_limit": 4.0}),
        (LagrangianDistillTrainer, {"multiplier": "dual"}),
        (GKDDistillTrainer, {"teacher_prob_floor": 1e-3}),
        (MiniLLMDistillTrainer, {"teacher_mixed_alpha": 0.0}),
        # Tokens of a tool are sent, as the teacher must read them, and not asked about.
        (ConstrainedDistillTrainer, {"env_mask": [[index % 3 != 1 for index in range(len(ids))] for ids in ROLLOUTS]}),
    ],
    ids=["constrained", "recomputed", "teacher_nll", "dual", "gkd", "minillm", "tools"],
)
def test_exact_server_is_the_local_teacher(tmp_path, monkeypatch, exact_server, trainer_class, settings):
    """Costs, loss and gradients of every method."""
    results = []
    for server in (None, exact_server):
        trainer = build(tmp_path, server, trainer_class, **settings)
        captured = capture_rollouts(trainer, monkeypatch)
        batches = micro_batches(trainer, make_rows(8))
        results.append((captured[0], *loss_and_gradients(trainer, batches)))
    (local, local_loss, local_gradients), (remote, remote_loss, remote_gradients) = results
    assert local.costs.max() > 0.1
    torch.testing.assert_close(remote.costs, local.costs, rtol=1e-5, atol=1e-5)
    assert remote_loss == pytest.approx(local_loss, rel=1e-5, abs=1e-7)
    assert relative_error(remote_gradients, local_gradients) < 1e-5


@pytest.mark.parametrize("cost", ["log_ratio", "teacher_nll"])
def test_completion_server(tmp_path, monkeypatch, completion_server, cost):
    """Sampled costs and advantages are those of the teacher in this process; nothing claims to be a divergence."""
    settings = {"cost": cost, "violation_distill_coef": 0.0, "cost_limit": 1.0}
    results = []
    for server in (None, completion_server):
        trainer = build(tmp_path, server, **settings)
        captured = capture_rollouts(trainer, monkeypatch)
        batches = micro_batches(trainer, make_rows(8))
        results.append((captured[0], trainer._signal(captured[0]).advantages, loss_and_gradients(trainer, batches)))
    local, remote = results
    assert remote[0].costs is None
    torch.testing.assert_close(remote[0].teacher_logps, local[0].teacher_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(remote[0].student_logps, local[0].student_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(remote[1], local[1], rtol=1e-4, atol=1e-5)
    assert relative_error(remote[2][1], local[2][1]) < 1e-4


def test_lower_bound_is_logged_and_below_the_divergence(tmp_path, completion_server):
    def logged(server, name, **settings):
        trainer = build(tmp_path, server, **settings)
        trainer._generate_and_score_completions(make_rows(8))
        measured = metrics(trainer)
        assert ("teacher/divergence" in measured) == (server is None)
        return measured[name]

    bounds = [
        logged(
            completion_server, "teacher/divergence_lower_bound", **LOG_PROBS_ONLY, teacher_model_server_top_k=tokens
        )
        for tokens in (1, 5, VOCAB)
    ]
    exact = logged(None, "teacher/divergence")
    assert 0 < bounds[0] < bounds[1] < bounds[2]
    assert bounds[1] < exact
    assert bounds[2] == pytest.approx(exact, rel=1e-5)


class Together:
    """
    A student whose forward begins when the requests about four rollouts have reached the server, and, as its fault, a
    server that answers when that forward has ended.
    """

    def __init__(self, trainer):
        self.arrived, self.forwards, self.in_vain = 0, 0, []
        self.changed = threading.Condition()
        trainer.model.model.register_forward_pre_hook(lambda *_: self.wait("student", lambda: self.arrived == 4))
        trainer.model.model.register_forward_hook(lambda *_: self.count_forward())

    def wait(self, who, condition):
        with self.changed:
            if not self.changed.wait_for(condition, timeout=3):
                self.in_vain.append(who)

    def count_forward(self):
        with self.changed:
            self.forwards += 1
            self.arrived = 0
            self.changed.notify_all()

    def __call__(self, handler, payload):
        with self.changed:
            self.arrived += 1
            earlier = self.forwards
            self.changed.notify_all()
        self.wait("server", lambda: self.forwards > earlier)
        return False


@pytest.mark.parametrize("exact", [True, False], ids=["hidden states", "log-probabilities"])
def test_the_server_computes_while_the_student_does(tmp_path, exact_server, completion_server, exact):
    """When rollouts are scored, and in the loss if their hidden states are asked for once more."""
    server, settings = (exact_server, {}) if exact else (completion_server, LOG_PROBS_ONLY)
    settings |= {"completions": random_completions(4), "teacher_hidden_memory_mb": 1e-6, "cost_limit": 1e-3}
    trainer = build(tmp_path, server, **settings)
    server.fault = together = Together(trainer)
    if exact:
        loss_and_gradients(trainer, micro_batches(trainer, make_rows(4)))
    else:
        trainer._generate_and_score_completions(make_rows(4))
    assert together.forwards == 1 + exact
    assert not together.in_vain


def test_requests_are_bounded_and_out_before_they_are_needed(tmp_path, exact_server, monkeypatch):
    """As many as the client allows, of more than one batch, and answered in any order: the numbers are the same."""

    def scored(concurrency):
        teacher = RemoteTeacher(exact_server.url, exact_server.key, concurrency=concurrency)
        trainer = make_scripted_trainer(tmp_path, teacher_model=teacher, completions=random_completions(16))
        captured = capture_rollouts(trainer, monkeypatch)
        return loss_and_gradients(trainer, micro_batches(trainer, make_rows(16))), captured[0].costs

    (loss, gradients), costs = scored(concurrency=1)
    changed, under_way, most = threading.Condition(), set(), [0]

    def out_of_order(handler, payload):
        with changed:
            under_way.add(handler)
            most[0] = max(most[0], len(under_way))
            changed.notify_all()
            changed.wait_for(lambda: most[0] >= 6, timeout=3)
        time.sleep(0.02 * random.random())
        with changed:
            under_way.remove(handler)
        return False

    exact_server.fault = lambda handler, payload: (
        out_of_order(handler, payload) if payload and len(payload["input"]) > 3 else False
    )
    (other_loss, other_gradients), other_costs = scored(concurrency=6)
    assert most == [6]  # four rollouts are scored at a time
    assert torch.equal(other_costs, costs)
    assert other_loss == loss
    assert all(torch.equal(other_gradients[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("how", ["the student fails", "interrupt"])
def test_no_request_outlives_its_step(tmp_path, in_foreground, exact_server, how):
    """What is under way is given up at once, what is not sent stays unsent, and no thread waits for it."""
    teacher = RemoteTeacher(exact_server.url, exact_server.key, concurrency=2, max_wait=1)
    trainer = make_scripted_trainer(tmp_path, teacher_model=teacher)
    asked, over = threading.Semaphore(0), threading.Event()

    def hang(handler, payload):
        asked.release()
        over.wait(5)

    exact_server.fault = hang
    before = set(threading.enumerate())
    if how == "interrupt":

        def interrupt():
            asked.acquire()
            time.sleep(0.5)  # until it is waited for
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
    else:

        def fail(*_):
            asked.acquire()
            raise RuntimeError("the student fails")

        trainer.model.model.register_forward_hook(fail)
    count = len(exact_server.requests)
    with pytest.raises(RuntimeError if how == "the student fails" else KeyboardInterrupt):
        trainer._generate_and_score_completions(make_rows(8))
    over.set()
    time.sleep(0.3)
    # Two were under way, and gave way to two more before those were cancelled too.
    assert len(exact_server.requests) <= count + 4
    left = {thread for thread in threading.enumerate() if "process_request" not in thread.name} - before
    assert not {thread for thread in left if thread.is_alive()}
    exact_server.fault = None
    assert len(teacher.hidden_states([[2, 3, 4]], [2])[0]) == 2  # it can be asked again


def test_the_wait_for_the_server_is_logged(tmp_path, exact_server):
    """Seconds of each step, and none where the teacher is in this process."""
    exact_server.fault = lambda handler, payload: time.sleep(0.05) or False
    trainer = train(tmp_path / "server", exact_server, save_strategy="no", max_steps=2)
    waits, steps = history(trainer, "teacher/wait_time"), history(trainer, "step_time")
    assert len(waits) == 2
    assert all(0 < wait < step for wait, step in zip(waits, steps, strict=True))
    local = train(tmp_path / "local", None, save_strategy="no", max_steps=1)
    assert not history(local, "teacher/wait_time")


class AtStep(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def train(tmp_path, server, action=None, *, resume=False, **kwargs):
    """Trained for four steps, with an action after the second."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "teacher_model_server_max_wait": 10}
    callbacks = [] if action is None else [AtStep(2, action)]
    trainer = build(tmp_path, server, callbacks=callbacks, **{**settings, **kwargs})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_training_goes_on_after_the_server_was_away(tmp_path, exact_server):
    """Failing between two steps for a while: the weights are those of a quiet run."""
    quiet = train(tmp_path / "quiet", exact_server)

    def fail():
        exact_server.fault = fail_first(3, 503)

    failing = train(tmp_path / "failing", exact_server, fail)
    assert relative_error(weights(failing), weights(quiet)) < 1e-6


def test_a_server_that_is_gone_ends_training_with_a_whole_checkpoint(tmp_path, folder, exact_server):
    """One error that says what to do; the last checkpoint resumes to the weights of the run never interrupted."""
    quiet = train(tmp_path / "quiet", exact_server)
    server = FakeServer(make_teacher().eval(), folder, key=KEY)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def kill():
        server.shutdown()
        server.server_close()

    with pytest.raises(TeacherServerError, match=r"did not answer for .* resume with") as error:
        train(tmp_path / "broken", server, kill, teacher_model_server_max_wait=1)
    assert KEY not in str(error.value)
    assert (tmp_path / "broken" / "checkpoint-2").is_dir()
    resumed = train(tmp_path / "broken", exact_server, resume=True)
    assert resumed.state.global_step == 4
    assert relative_error(weights(resumed), weights(quiet)) < 1e-6


def test_key_and_teacher_are_written_nowhere(tmp_path, caplog, capfd, exact_server):
    """Not in a checkpoint, the arguments, a card, a log, or what is printed; only the head is in this process."""
    trainer = train(tmp_path, exact_server)
    trainer.save_model(str(tmp_path / "final"))
    trainer.create_model_card()
    args = trainer.args
    texts = [repr(args), str(args), args.to_json_string(), caplog.text, *capfd.readouterr(), repr(trainer.teachers)]
    assert not [text for text in texts if KEY in text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes() or "teacher" in path.name]
    assert any(headers.get("Authorization") == f"Bearer {KEY}" for _, _, headers in exact_server.requests)
    assert trainer.teacher_model is None


class TestBadInput:
    @pytest.mark.parametrize(
        ("error", "message", "settings"),
        [
            (TeacherServerError, "does not accept the API key", {"teacher_model_server_api_key": "another"}),
            (
                ValueError,
                "different tokenizers",
                {"model": make_model(vocab_size=5), "tokenizer": make_tokenizer("abc")},
            ),
            (ValueError, "the server runs the teacher", {"teacher_model": make_teacher()}),
            (
                ValueError,
                "leave out `teacher_model` and `teacher_model_server_url`, or it",
                {"teacher_adapter_name": "base"},
            ),
            (
                ValueError,
                "leaves no room for a prompt in the teacher server's 32 tokens",
                {"max_completion_length": 32},
            ),
            (
                ValueError,
                "samples completions from the teacher",
                {"trainer_class": MiniLLMDistillTrainer, "rollout_func": None},
            ),
        ],
    )
    def test_refused(self, tmp_path, exact_server, error, message, settings):
        with pytest.raises(error, match=message):
            build(tmp_path, exact_server, **settings)

    def test_checkpoint_by_path(self, tmp_path, folder, exact_server):
        """Where the server's own path cannot be read here."""
        exact_server.models["data"][0]["root"] = "/not/here"
        with pytest.raises(ValueError, match=r"config cannot be read from '/not/here'.* Pass the checkpoint"):
            build(tmp_path, exact_server)
        trainer = build(tmp_path, exact_server, teacher_model=str(shutil.copytree(folder, tmp_path / "copy")))
        assert micro_batches(trainer, make_rows(8))

    @pytest.mark.parametrize(
        ("trainer_class", "settings", "message"),
        [
            (ConstrainedDistillTrainer, {}, "needs the divergence"),
            (ConstrainedDistillTrainer, {"cost": "log_ratio"}, "needs the divergence"),
            (
                ConstrainedDistillTrainer,
                {**LOG_PROBS_ONLY, "cost_limit": "auto", "auto_limit_steps": 1},
                "needs the divergence",
            ),
            (LagrangianDistillTrainer, {}, "needs the divergence"),
            (GKDDistillTrainer, {}, "needs the divergence"),
            (MiniLLMDistillTrainer, {"teacher_mixed_alpha": 0.0}, "needs the divergence"),
            (ConstrainedDistillTrainer, {**LOG_PROBS_ONLY, "temperature": 0.7}, "at temperature 1 and no more"),
            (ConstrainedDistillTrainer, {**LOG_PROBS_ONLY, "teacher_prob_floor": 0.1}, "at temperature 1 and no more"),
        ],
    )
    def test_refused_of_a_completion_server(self, tmp_path, completion_server, trainer_class, settings, message):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, completion_server, trainer_class, **settings)

    def test_nan_from_the_server(self, tmp_path, exact_server):
        trainer = build(tmp_path, exact_server)
        with torch.no_grad():
            exact_server.model.model.norm.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="The teacher returned NaN or infinite values at step 0"):
            micro_batches(trainer, make_rows(8))
