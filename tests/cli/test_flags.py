"""Every spelling that a command took before click, frozen: each must be taken for ever."""

from importlib import import_module
from typing import Any

import click
import pytest

from keras_mrl_cli.__main__ import COMMANDS

SERVER = (
    "--model=m --timeout=3 --tls-ca=ca.pem --tls-server-name=birds.example.org --tls-cert=c.pem "
    "--tls-key=k.pem --metadata=a=b --no-proxy"
)
FILES = "--max-batch-size=9 --scale=0.5"
# By command: what it needs, and flag by flag what it took, with a value that fits.
FLAGS = {
    "classify": (
        "localhost:8500 a.jpg",
        f"{SERVER} {FILES} --json --dim=8 --policy=p.json --top=3",
    ),
    "regress": ("localhost:8500 a.jpg", f"{SERVER} {FILES} --json --dim=8"),
    "embed": (
        "localhost:8500 a.jpg",
        f"{SERVER} {FILES} --json --dim=8 --quality=0.98 --quality=top1=0.98 --out=E.npy",
    ),
    "search": (
        "birds.index a.jpg",
        f"{SERVER} {FILES} --query=Q.npy --k=3 --among=I.npy --no-verify --json --target=t:1",
    ),
    "adapt": (
        "--embeddings=E.npy --out=adapted",
        "--dims=16,32 --method=listwise --max-dim=64 --fingerprint=5e1f --rows=500 --steps=9 "
        "--seed=1 --json",
    ),
    "index build": (
        "--embeddings=E.npy --out=birds.index",
        f"{SERVER} --ids=I.npy --metric=cosine --metric=dot --metric=l2 --k=3 --engine=faiss "
        "--engine=exact --force --json --dims=8,16 --shortlists=9 --shortlists=none "
        "--first-stage=HNSW32 --settings=efSearch=9 --target-recall=0.9 --target-precision=0.9 "
        "--target-map=0.9 --labels=L.npy --queries=Q.npy --query-labels=QL.npy --sample=9 "
        "--seed=1 --batch=2 --fingerprint=5e1f --target=t:1",
    ),
    "index show": ("birds.index", "--json"),
    "inspect": ("models/digits", f"{SERVER} --json"),
    "publish": (
        "models/digits --policy=p.json",
        "--base-path=models/b --version=3 --sample=x.npy",
    ),
    "export": (
        "digits.keras --base-path=models/digits",
        "--sample=x.npy --policy=p.json --labels=names.txt --dims=8,16 --signatures=embed,head_8 "
        "--images=a.jpg --pixel-scale=0.5 --top-k=3 --name=birds --version=3 --no-normalize "
        "--import=my_layers",
    ),
    "deploy": (
        "out --model-base-path=models/digits",
        "--name=birds --image=tfs:1 --replicas=3 --port=1 --rest-port=2 --memory=9 "
        "--max-batch-size=8 --force",
    ),
    "compare": (
        "--data=birds",
        "--test=birds --out=out --dims=8,16 --seeds=2 --budget=60 --epochs=3 --filters=8 "
        "--size=32 --unseen --no-flip --json",
    ),
    "demo": (
        "",
        "--backend=tensorflow --backend=jax --backend=torch --out=out --epochs=1 --seed=1 --json",
    ),
    "serve": (
        "--model_base_path=models/digits",
        "--model_name=m --port=1 --file_system_poll_wait_seconds=-1 --model_config_file=c "
        "--model_config_file_poll_wait_seconds=3 --rest_api_port=2 --rest_api_timeout_in_ms=9 "
        "--grpc_socket_path=/tmp/s --grpc_channel_arguments=a=1,b=2 --ssl_config_file=c "
        "--enable_batching --enable_batching=true --enable_batching=false "
        "--batching_parameters_file=c --enable_model_warmup=false "
        "--enable_grpc_healthcheck_service=true --enable_serialization_as_tensor_content=true "
        "--allow_version_labels_for_unavailable_models=true --max_num_load_retries=1 "
        "--load_retry_interval_micros=1 --dev",
    ),
}
# What holds without the flag.
DEFAULTS = {"--metric=cosine", "--engine=faiss"}
# One language: the spelling that help shows now, by the one of before.
RENAMED = {("deploy", "--model-base-path"): "--base-path"}


def command_of(name: str) -> click.Command:
    module, *part = name.split()
    command: Any = getattr(import_module(f"keras_mrl_cli.{module}"), module)
    return command.commands[part[0]] if part else command


def parsed(name: str, words: list[str]) -> dict[str, Any]:
    return command_of(name).make_context(name, list(words)).params


def test_no_command_is_left_out() -> None:
    assert {name.split()[0] for name in FLAGS} == set(COMMANDS)


@pytest.mark.parametrize(
    ("name", "flag"),
    [(name, flag) for name, (_, flags) in FLAGS.items() for flag in flags.split()],
)
def test_a_flag_of_before_is_taken(name: str, flag: str) -> None:
    needed = FLAGS[name][0].split()
    without = parsed(name, needed)
    spelled, equals, value = flag.partition("=")
    arguments = parsed(name, [*needed, flag])
    changed = {key for key in arguments if arguments[key] != without[key]}
    assert len(changed) == (flag not in DEFAULTS)
    if equals:  # two words are taken like one
        assert parsed(name, [*needed, spelled, value]) == arguments


# The real server judges the flags that `serve` does not know.
@pytest.mark.parametrize("name", sorted(FLAGS.keys() - {"serve"}))
def test_no_flag_may_be_cut_short(name: str) -> None:
    for flag in FLAGS[name][1].split():
        spelled = flag.partition("=")[0]
        for cut in (spelled[:-1], spelled + "x"):
            if len(cut) > 2 and cut not in {o for p in command_of(name).params for o in p.opts}:
                with pytest.raises(click.NoSuchOption):
                    parsed(name, [*FLAGS[name][0].split(), cut])


def test_old_spellings_are_taken_and_not_shown() -> None:
    for (name, old), new in RENAMED.items():
        needed = [word for word in FLAGS[name][0].split() if not word.startswith(old)]
        assert parsed(name, [*needed, f"{old}=x"]) == parsed(name, [*needed, f"{new}=x"])
        help = command_of(name).get_help(click.Context(command_of(name)))
        assert new in help
        assert old not in help


def test_words_in_the_place_of_flags() -> None:
    """TARGET of commands about files, and of `inspect`, are read by the commands themselves."""
    for name in ("classify", "regress", "embed"):
        assert parsed(name, ["t:1", "a.jpg"])["files"] == ("t:1", "a.jpg")
        arguments = parsed(name, ["--target", "t:1", "a.jpg"])
        assert (arguments["target"], arguments["files"]) == ("t:1", ("a.jpg",))
    assert parsed("inspect", ["t:1"])["folder"] == "t:1"
