"""The options that are read from sources: exactly those of the real parsers, so that nothing which they take is refused."""

import argparse

import pytest
from accelerate.commands.launch import launch_command_parser

from trl_cmdp import cli
from trl_cmdp.cli import _options
from trl_cmdp.cli._options import Option, SourceNotFoundError, launch_options, training_options
from trl_cmdp.cli._parser import underscored
from trl_cmdp.cli._run import distill_class
from trl_cmdp.cli._settings import topics
from trl_cmdp.cli._train import TrainingParser
from trl_cmdp.cli._training_arguments import check_training_arguments


COMMANDS = ["constrained", "lagrangian", "gkd", "minillm"]


def taken(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Every long option of a parser, as `main` hands it over."""
    return {
        underscored([name])[0][2:]: action
        for name, action in parser._option_string_actions.items()
        if name[:2] == "--"
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_the_real_parser_is_known(command):
    real = taken(TrainingParser(command, distill_class(command, "Config")))
    options = training_options(command)
    assert {name for name in real if not name.startswith("no_")} - {"help"} == options.keys()
    assert {name[3:] for name in real if name.startswith("no_")} <= options.keys()
    assert {name for name in taken(launch_command_parser()) if name != "help"} <= launch_options()
    for name, option in options.items():
        assert option.several or real[name].nargs in (None, "?"), name
        if option.choices:
            assert set(option.choices) == set(map(str, real[name].choices)), name
        if option.default is not None and option.kind != "text":
            assert option.default == real[name].default, name


@pytest.mark.parametrize("command", COMMANDS)
def test_no_value_is_refused_that_the_real_parser_takes(command):
    real = taken(TrainingParser(command, distill_class(command, "Config")))
    for name, option in training_options(command).items():
        for text in (
            "1",
            "-1",
            " 2 ",
            "1_000",
            "0.5",
            "1e-3",
            "inf",
            "nan",
            "true",
            "none",
            "Null",
            "mean",
            "auto",
            "",
            "x y",
        ):
            try:
                value = real[name].type(text)
                accepted = real[name].choices is None or value in real[name].choices
            except (TypeError, ValueError, argparse.ArgumentTypeError):
                accepted = False
            if accepted:
                assert option.check(text) == text, (name, text)


def test_no_argument_is_refused_that_the_real_parser_takes(tmp_path):
    """Either spelling, `--name=value`, bare and negated switches, several values, and what accelerate takes."""
    given = ["--model_name_or_path", "org/student", "--teacher_model", "org/teacher", "--dataset_name", "org/data"]
    given += ["--output_dir", str(tmp_path / "out")]
    for more in (
        ["--use_peft", "--load-in-4bit", "--no_gradient-checkpointing", "--max_steps=-1", "--learning-rate", "1e-5"],
        ["--reward_funcs", "accuracy_reward", "think_format_reward", "--reward_weights", "1", "0.5"],
        ["--num_processes", "2", "--multi_gpu", "--main-process-port", "0", "--accelerate_config", "fsdp2"],
        ["--model_init_kwargs", '{"a": 1}', "--temperature", "0.7", "--bf16", "false", "--eval_strategy", "no"],
        ["--cost_limit", "auto", "--max_steps", "51"],
        ["--cost_limit", '{"math": 0.2, "code": 0.4}'],
    ):
        check_training_arguments("constrained", underscored([*given, *more]))


def test_where_the_libraries_are_laid_out_otherwise_their_parser_decides(monkeypatch):
    def moved(*arguments):
        raise SourceNotFoundError

    monkeypatch.setattr("trl_cmdp.cli._training_arguments.training_options", moved)
    check_training_arguments("gkd", ["--an_option", "that may be theirs"])


def test_definitions_are_found_behind_aliases_and_conditions(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import Config as Renamed\n"
    )
    (package / "a.py").write_text(
        "try:\n    from .b import Base\nexcept ImportError:\n    Base = object\n"
        "Kind = Literal['x', 'y']\nDEFAULT = 3\n"
        "class Config(Base):\n    kind: Kind = 'x'\n    count: Optional[int] = DEFAULT\n    many: list[float] | None = None\n"
        "    computed: int = field(default_factory=len)\n    hidden: int = field(init=False)\n    shared: ClassVar[int] = 1\n"
        "    said: str = field(default='a', metadata={'help': 'Two ' 'parts.'})\n"
    )
    (package / "b.py").write_text("class Base:\n    kind: str = 'z'\n    base: bool = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = _options._fields("some_package", "Renamed")
    assert list(found) == ["kind", "base", "count", "many", "computed", "said"]
    assert found["kind"] == Option("kind", "choice", False, ("x", "y"), False, "x", "", "")
    assert (found["count"].kind, found["count"].default, found["count"].nullable) == ("int", 3, True)
    assert (found["many"].kind, found["many"].several) == ("float", True)
    assert (found["base"].kind, found["base"].default, found["said"].help) == ("bool", True, "Two parts.")
    with pytest.raises(SourceNotFoundError):
        _options._fields("some_package", "Missing")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_short_help_begins_with_student_teacher_and_limit(command, capsys):
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") < 300
    titles = list(topics(command))
    assert titles[:3] == ["student", "teacher", "limit"]
    positions = [out.index(f"\n{title}:\n") for title in titles]
    assert positions == sorted(positions)
    for name, option in training_options(command).items():
        assert (f"\n  --{name} " in out) or not option.owner, f"{name} of this package is not shown"
    assert "--help_all" in out
    assert "--vespo_k_pos" not in out  # TRL's own
