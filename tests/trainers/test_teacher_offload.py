"""
A teacher whose weights are in host memory while the student generates and learns: where they are at each moment, and that
training is the same, bit for bit. A CPU has one memory: there the copy that is used and the one that waits are told apart
by their addresses.
"""

import gc

import pytest
import torch
from datasets import Dataset
from helpers import (
    history,
    make_dataset,
    make_lora,
    make_model,
    make_teacher,
    make_trainer,
    run,
    same_weights,
    save_model,
)
from peft import get_peft_model
from tiny_vision import make_image_dataset, make_processor, make_seeing_teacher, make_vlm
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_cmdp import (
    ConstrainedDistillTrainer,
    GKDDistillTrainer,
    LagrangianDistillTrainer,
    MiniLLMDistillTrainer,
)
from trl_cmdp.teachers import AdapterTeacher, LocalTeacher, offloaded
from trl_cmdp.trainers.engine.teachers import make_teachers


class Watched:
    """A teacher that a trainer has offloaded: which copy of its weights is in use, and that none is left behind."""

    def __init__(self, teacher, kept=("lm_head.weight",)):
        self._moved = {name: one for name, one in teacher.named_parameters() if name not in kept}
        self._waiting = {name: one.data_ptr() for name, one in self._moved.items()}
        self._copies = []
        self.forwards = 0
        teacher.register_forward_pre_hook(self._on_forward)

    @property
    def on_device(self) -> bool:
        (found,) = {one.data_ptr() != self._waiting[name] for name, one in self._moved.items()}  # all or none
        return found

    @property
    def left_behind(self) -> int:
        return sum(not copy.expired() for copy in self._copies)

    def _on_forward(self, module, inputs):
        assert self.on_device
        self.forwards += 1
        self._copies.extend(StorageWeakRef(one.untyped_storage()) for one in self._moved.values())


def two_teachers():
    return {"near": make_teacher(), "far": make_teacher(2, hidden_size=20, spread=0.9)}


def data_of_two() -> Dataset:
    data = make_dataset()
    return data.add_column("teacher", [["near", "far"][index % 2] for index in range(len(data))])


def tied_teacher():
    return make_teacher(tie_word_embeddings=True)


def adapted_teacher():
    torch.manual_seed(3)
    return get_peft_model(make_teacher(), make_lora(init_lora_weights=False))


RUNS = {
    "kept": (ConstrainedDistillTrainer, make_teacher, {"cost_limit": 1e-3}),
    "recomputed": (ConstrainedDistillTrainer, make_teacher, {"cost_limit": 1e-3, "teacher_hidden_memory_mb": 1e-6}),
    "tied": (ConstrainedDistillTrainer, tied_teacher, {"cost_limit": 1e-3}),
    "adapter": (ConstrainedDistillTrainer, adapted_teacher, {"cost_limit": 1e-3}),
    "bf16": (ConstrainedDistillTrainer, make_teacher, {"cost_limit": 1e-3, "bf16": True}),
    "log-probabilities": (
        ConstrainedDistillTrainer,
        make_teacher,
        {"cost": "teacher_nll", "violation_distill_coef": 0.0, "cost_limit": 2.0},
    ),
    "mixed": (MiniLLMDistillTrainer, make_teacher, {"teacher_mixed_alpha": 0.3}),
    "written": (GKDDistillTrainer, make_teacher, {"lmbda": 0.0, "seq_kd": True}),
    "two": (
        LagrangianDistillTrainer,
        two_teachers,
        {"train_dataset": data_of_two(), "per_device_train_batch_size": 8, "teacher_hidden_memory_mb": 1e-6},
    ),
}


@pytest.mark.parametrize(("trainer_class", "teacher", "settings"), RUNS.values(), ids=RUNS)
def test_training_is_the_same(tmp_path, monkeypatch, trainer_class, teacher, settings):
    """Losses, costs and weights; the teacher's weights wait during the student's generation, forward and backward."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    settings = {
        "eval_dataset": settings.get("train_dataset", make_dataset(1)).select(range(2)),
        **evaluated,
        **settings,
    }
    plain = run(tmp_path, trainer_class, teacher_model=teacher(), **settings)

    models = teacher()
    trainer = make_trainer(tmp_path, trainer_class, teacher_model=models, teacher_offload=True, **settings)
    by_name = models if isinstance(models, dict) else {"": models}
    kept = ("lm_head.weight", "model.embed_tokens.weight" if teacher is tied_teacher else "")
    watched = [Watched(one, (*kept, *(f"base_model.model.{name}" for name in kept))) for one in by_name.values()]
    waiting = {"learning": [], "generating": []}

    def note(module, inputs, kwargs):
        assert sum(one.on_device for one in watched) <= 1
        if torch.is_grad_enabled():
            waiting["learning"].append(not any(one.on_device for one in watched))
        elif kwargs.get("use_cache"):
            waiting["generating"].append(not any(one.on_device for one in watched))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    backward = trainer.accelerator.backward
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: (note(None, None, {}), backward(loss)))
    trainer.train()

    assert same_weights(trainer, plain)
    for name in {"loss", "eval_loss", "grad_norm", "distill_loss", "constraint/cost", "eval_constraint/cost"}:
        assert history(trainer, name) == history(plain, name), name
    assert all(one.forwards for one in watched)
    assert not any(one.on_device or one.left_behind for one in watched)
    assert len(waiting["learning"]) >= 4
    assert all(waiting["learning"])
    if trainer_class is MiniLLMDistillTrainer:
        assert not all(waiting["generating"])  # the teacher takes part
    else:
        assert all(waiting["generating"])


def test_prompts_with_images(tmp_path):
    """The teacher is tried with two images before training, and waits again afterwards."""

    def settings():
        return {
            "model": make_vlm("idefics"),
            "tokenizer": make_processor("idefics"),
            "train_dataset": make_image_dataset((2, 0, 2, 0), copies=1),
            "reward_funcs": lambda completion_ids, **_: [float(sum(ids) % 5) for ids in completion_ids],
            "num_generations": 2,
            "cost_limit": 1e-3,
            "max_steps": 2,
        }

    plain = run(tmp_path, teacher_model=make_seeing_teacher("idefics"), **settings())
    teacher = make_seeing_teacher("idefics")
    trainer = make_trainer(tmp_path, teacher_model=teacher, teacher_offload=True, **settings())
    watched = Watched(teacher)
    assert not watched.left_behind
    trainer.train()
    assert watched.forwards
    assert not watched.on_device
    assert same_weights(trainer, plain)
    assert history(trainer, "constraint/cost") == history(plain, "constraint/cost")


def test_beside_the_students_own_base(tmp_path):
    """Of several teachers those that have weights of their own are moved, and the others left as they are."""
    student, teacher = get_peft_model(make_model(), make_lora()), make_teacher()
    trainer = make_trainer(
        tmp_path,
        model=student,
        teacher_model={"near": AdapterTeacher(student, None, "base"), "far": teacher},
        train_dataset=data_of_two(),
        teacher_offload=True,
        max_steps=2,
    )
    watched = Watched(teacher)
    before = {name: one.data_ptr() for name, one in student.named_parameters()}
    trainer.train()
    assert watched.forwards
    assert not watched.on_device
    assert {name: one.data_ptr() for name, one in student.named_parameters()} == before


def test_weights_can_be_read_while_they_wait(tmp_path):
    """As a checkpoint's identity does: a run may be resumed with and without `teacher_offload`."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "teacher_offload": True, "cost_limit": 1e-3}
    whole = run(tmp_path, teacher_model=make_teacher(), **settings)
    before = {name: one.clone() for name, one in make_teacher().named_parameters()}
    assert all(torch.equal(one, before[name]) for name, one in whole.teacher_model.named_parameters())
    for offload in (True, False):
        resumed = make_trainer(
            tmp_path / str(offload), teacher_model=make_teacher(), **{**settings, "teacher_offload": offload}
        )
        resumed.train(str(tmp_path / "checkpoint-2"))
        assert same_weights(resumed, whole)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("recomputed", [False, True])
def test_interrupted_while_it_is_asked(tmp_path, error, recomputed):
    """The weights are in host memory again, and training can begin again."""
    teacher = make_teacher()
    memory = 1e-6 if recomputed else 256
    trainer = make_trainer(
        tmp_path, teacher_model=teacher, teacher_offload=True, cost_limit=1e-3, teacher_hidden_memory_mb=memory
    )
    watched = Watched(teacher)

    def interrupt(module, inputs):
        if watched.forwards == (2 if recomputed else 1):
            raise error

    hook = teacher.model.norm.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        trainer.train()
    assert not watched.on_device
    assert not watched.left_behind
    hook.remove()
    trainer.train()
    assert not watched.on_device


class StopAtCopy(TorchDispatchMode):
    """Ctrl-C at the n-th copy of a tensor."""

    def __init__(self, number: int):
        super().__init__()
        self._left = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default or func is torch.ops.aten.clone.default:
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


IDS = torch.arange(2, 10).unsqueeze(0)


def ask(teacher: LocalTeacher) -> torch.Tensor:
    return teacher.hidden_states(IDS, torch.ones_like(IDS), torch.ones(1, 4, dtype=torch.bool))


def test_interrupted_while_the_weights_are_copied():
    model = make_teacher().eval().requires_grad_(False)
    teacher = LocalTeacher(model)
    expected = ask(teacher)
    offload = offloaded([teacher])
    watched = Watched(model)
    with pytest.raises(KeyboardInterrupt), StopAtCopy(3):
        ask(teacher)
    assert not watched.on_device
    assert torch.equal(ask(teacher), expected)
    offload.unload()
    assert not watched.on_device


def test_teachers_that_share_weights():
    """One model under two names, and two models over one embedding: each is asked as before, in any order."""
    first, second = (make_teacher(seed).eval().requires_grad_(False) for seed in (1, 2))
    second.set_input_embeddings(first.get_input_embeddings())
    teachers = [LocalTeacher(model) for model in (first, second, first)]
    expected = [ask(teacher) for teacher in teachers]
    offload = offloaded(teachers)
    shared = first.get_input_embeddings().weight
    waiting = shared.data_ptr()
    for index in (0, 1, 2, 1, 1, 0):
        assert torch.equal(ask(teachers[index]), expected[index])
        assert shared.data_ptr() != waiting
    offload.unload()
    assert shared.data_ptr() == waiting


def test_four_bit_teacher(tmp_path):
    # A CPU with bf16 instructions packs 4-bit weights by 32 rows.
    path = save_model(tmp_path, make_model(1, hidden_size=64, intermediate_size=64, spread=0.3))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config).eval()
    teacher = LocalTeacher(model)
    expected = ask(teacher)
    offload = offloaded([teacher])
    watched = Watched(model)
    for _ in range(2):
        assert torch.equal(ask(teacher), expected)
        offload.unload()
        assert not watched.on_device
        assert not watched.left_behind


class TestRefused:
    def test_eight_bit_teacher(self, tmp_path):
        path = save_model(tmp_path / "teacher", make_teacher(hidden_size=64))
        with pytest.raises(ValueError, match=r"quantised or sharded.*4 bits"):
            make_trainer(
                tmp_path,
                teacher_model=path,
                teacher_offload=True,
                teacher_model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
            )

    def test_teacher_on_several_devices(self):
        model = make_teacher()
        model.model.layers[0].to("meta")
        with pytest.raises(ValueError, match="on cpu, meta, as its `device_map`"):
            offloaded([LocalTeacher(model)])

    @pytest.mark.parametrize("framework", ["is_fsdp_enabled", "is_deepspeed_enabled"])
    def test_sharded_teacher(self, tmp_path, framework):
        """Before the teacher is read."""
        trainer = make_trainer(tmp_path, teacher_model=make_teacher(), teacher_offload=True)
        setattr(trainer, framework, True)
        with pytest.raises(ValueError, match=r"`fsdp_offload_params: true` or ZeRO-3's `offload_param_device: cpu`"):
            make_teachers(trainer, "nowhere")

    def test_teachers_without_weights_of_their_own(self, tmp_path):
        """Before anything is loaded."""
        student = get_peft_model(make_model(), make_lora())
        adapter = AdapterTeacher(student, None, "base")
        for given, settings in (
            (None, {"teacher_adapter_name": "base"}),
            (None, {"teacher_model_server_url": "http://127.0.0.1:9"}),
            (adapter, {}),
            ({"a": adapter, "b": adapter}, {}),
        ):
            with pytest.raises(ValueError, match=r"`teacher_offload` moves .* Leave it out"):
                make_trainer(tmp_path, model="nowhere", teacher_model=given, teacher_offload=True, **settings)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a CPU has one memory")
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "nf4"])
def test_memory_of_a_gpu(tmp_path, quantized):
    """While the student generates and learns the teacher's weights take no memory of the card, its head aside."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
    path = save_model(tmp_path / "teacher", make_model(1, spread=0.05, **shape))
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def train(offload: bool) -> tuple[dict[str, int], list[float], int]:
        """Peak of memory in each part of a step that is the student's own, losses, and bytes of the weights that move."""
        before = torch.cuda.memory_allocated()
        trainer = make_trainer(
            tmp_path,
            teacher_model=path,
            teacher_model_init_kwargs={"quantization_config": nf4} if quantized else None,
            teacher_offload=offload,
            cost_limit=1e-3,
            use_cpu=False,
        )
        peaks = {}

        def measured(name, function):
            def call(*args, **kwargs):
                torch.cuda.reset_peak_memory_stats()
                result = function(*args, **kwargs)
                peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated() - before)
                return result

            return call

        trainer._generate_single_turn = measured("generation", trainer._generate_single_turn)
        trainer.compute_loss = measured("forward", trainer.compute_loss)
        trainer.accelerator.backward = measured("backward", trainer.accelerator.backward)
        trainer.train()
        moved = [one.nbytes for name, one in trainer.teacher_model.named_parameters() if name != "lm_head.weight"]
        # Without rounding before the first update; later a backward of CUDA's may sum in another order.
        losses = [history(trainer, name)[0] for name in ("loss", "distill_loss", "constraint/cost")]
        return peaks, losses, sum(moved)

    plain, losses, moved = train(offload=False)
    gc.collect()
    offloaded_peaks, offloaded_losses, _ = train(offload=True)
    assert offloaded_losses == losses
    assert set(plain) == {"generation", "forward", "backward"}
    for name, peak in plain.items():
        assert peak - offloaded_peaks[name] > 0.95 * moved, name
