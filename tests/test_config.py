"""Bad options get a clear answer before anything runs; good ones are kept as they are."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_superpipe import errors
from lightning_superpipe.config import Adversary, Link, SuperpipeConfig
from lightning_superpipe.errors import ConfigError, SuperpipeError, SuperpipeWarning
from lightning_superpipe.option_checks import parse_bytes

# What was asked (the option and its value) must stand in every message; the third column is what to do about it.
BAD_OPTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"k": 0}, "k=0", "at least 1 or 'auto'"),
    ({"k": -3}, "k=-3", "at least 1"),
    ({"k": 2.0}, "k=2.0", "an integer"),
    ({"k": True}, "k=True", "an integer"),
    ({"k": "all"}, "k='all'", "'auto'"),
    ({"k": None}, "k=None", "'auto'"),
    ({"k_prime": 0}, "k_prime=0", "at least 1"),
    ({"k_prime": "most"}, "k_prime='most'", "at least 1 or 'auto'"),
    ({"device_memory": "full"}, "'full'", "such as '8GiB'"),
    ({"k_prime": 1.5}, "k_prime=1.5", "an integer"),
    ({"k": 2, "k_prime": 3}, "k_prime=3 is larger than k=2", "1 <= k_prime <= 2"),
    ({"k": 1, "k_prime": 2}, "k_prime=2 is larger than k=1", "1 <= k_prime <= 1"),
    ({"device_memory": "much"}, "'much'", "'8GiB'"),
    ({"device_memory": "-1GB"}, "'-1GB'", "'8GiB'"),
    ({"device_memory": -1}, "-1", "an integer"),
    ({"device_memory": 1.5}, "1.5", "an integer"),
    ({"device_memory": True}, "True", "an integer"),
    ({"host_memory": "plenty"}, "'plenty'", "'8GiB'"),
    ({"host_memory": -1}, "-1", "an integer"),
    ({"wire_dtype": "bf16"}, "wire_dtype='bf16'", "'bfloat16' and 'float16', or null"),
    ({"wire_dtype": torch.bfloat16}, "wire_dtype=torch.bfloat16", "'bfloat16' and 'float16', or null"),
    ({"wire_dtype": ["bfloat16"]}, "wire_dtype=['bfloat16']", "'bfloat16' and 'float16', or null"),
    ({"master_weights": "float64"}, "master_weights='float64'", "'float32', or null"),
    ({"master_weights": True}, "master_weights=True", "'float32', or null"),
    ({"master_weight": "float32"}, "'master_weight'", "did you mean 'master_weights'"),
    ({"pin_memory": "yes"}, "pin_memory='yes'", "true, false and 'auto'"),
    ({"fused_optimizer": None}, "fused_optimizer=None", "true, false and 'auto'"),
    ({"record_step": -1}, "record_step=-1", "0 or more"),
    ({"record_step": 1.0}, "record_step=1.0", "or null"),
    ({"record_step": True}, "record_step=True", "or null"),
    ({"activations": "recompte"}, "'recompte'", "did you mean 'recompute'"),
    ({"activations": "banana"}, "'banana'", "keep, recompute, offload, auto"),
    ({"activations": {"h.*": "drop"}}, "'drop'", "keep, recompute, offload, auto"),
    ({"activations": {}}, "activations={}", "at least one unit"),
    ({"activations": {3: "keep"}}, "{3: 'keep'}", "at least one unit"),
    ({"activations": None}, "activations=None", "a mapping of unit names"),
    ({"micro_batches": 0}, "micro_batches=0", "at least 1"),
    ({"micro_batches": "many"}, "micro_batches='many'", "at least 1 or 'auto'"),
    ({"micro_batches": "auto", "activations": "keep"}, "micro_batches='auto'", "Use activations='recompute'"),
    ({"micro_batches": 2, "activations": "keep"}, "activations='keep'", "Use activations='recompute'"),
    ({"micro_batches": 2, "activations": {"*": "offload"}}, "micro_batches=2", "Use activations='recompute'"),
    ({"units": 5}, "units=5", "a callable"),
    ({"units": ["Block", 3]}, "3", "a callable"),
    ({"store": "ssd"}, "store='ssd'", "'host' and 'disk'"),
    ({"store": None}, "store=None", "'host' and 'disk'"),
    ({"store": {"weight": "disk"}}, "'weight' is no kind", "did you mean 'weights'"),
    ({"store": {"states": "tape"}}, "'tape'", "'host' and 'disk'"),
    ({"disk": "/fast"}, "disk='/fast'", "folder"),
    ({"disk": {"folder": 3}}, "disk.folder=3", "the name of a folder"),
    ({"disk": {"keep": True}}, "disk.keep=True", "disk.folder"),
    ({"disk": {"undo": 1}}, "disk.undo=1", "true and false"),
    ({"disk": {"ring": 1}}, "disk.ring=1", "at least 2"),
    ({"disk": {"requests": 0}}, "disk.requests=0", "at least 1"),
    ({"step_aside": True, "store": "disk"}, "step_aside=True", "with store='disk'"),
    ({"step_aside": True, "k": 2, "wire_dtype": "bfloat16"}, "step_aside=True", "with k=2, wire_dtype='bfloat16'"),
    ({"disk": {"endurance_tb": 0}}, "disk.endurance_tb=0", "10^12"),
    ({"disk": {"dir": "/fast"}}, "'disk.dir'", "known options: disk.folder"),
    ({"link": 25}, "link=25", "h2d_gb_s"),
    ({"link": {"h2d_gb_s": 0}}, "link.h2d_gb_s=0", "positive"),
    ({"link": {"d2h_gb_s": -1.0}}, "link.d2h_gb_s=-1.0", "positive"),
    ({"link": {"h2d_gb_s": "fast"}}, "link.h2d_gb_s='fast'", "positive"),
    ({"link": {"latency_ms": -0.5}}, "link.latency_ms=-0.5", "not negative"),
    ({"link": {"h2d_gbs": 1}}, "'link.h2d_gbs'", "did you mean 'link.h2d_gb_s'"),
    ({"adversary": {"poisson": True}}, "'adversary.poisson'", "did you mean 'adversary.poison'"),
    ({"adversary": True}, "adversary=True", "poison"),
    ({"kprime": 2}, "'kprime'", "did you mean 'k_prime'"),
    ({"device_mem": 2}, "'device_mem'", "did you mean 'device_memory'"),
    ({"K": 2}, "'K'", "known options: k, k_prime, "),
]


@pytest.mark.parametrize(("options", "asked", "advice"), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_a_bad_option_is_answered_with_what_was_asked_and_what_to_do(
    options: dict[str, Any], asked: str, advice: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        SuperpipeConfig.from_options(**options)
    assert asked in str(raised.value)
    assert advice in str(raised.value)


@given(k=st.integers(-2, 6), k_prime=st.integers(-2, 6))
def test_a_window_is_accepted_exactly_if_it_can_exist(k: int, k_prime: int) -> None:
    try:
        config = SuperpipeConfig(k=k, k_prime=k_prime)
    except ConfigError:
        assert not 1 <= k_prime <= k
    else:
        assert (config.k, config.k_prime) == (k, k_prime)
        assert 1 <= k_prime <= k


def test_defaults_need_no_argument() -> None:
    assert SuperpipeConfig() == SuperpipeConfig(
        k="auto",
        k_prime="auto",
        device_memory=None,
        host_memory=None,
        wire_dtype=None,
        master_weights=None,
        units=None,
        activations="auto",
        micro_batches=1,
        pin_memory="auto",
        fused_optimizer="auto",
        record_step=None,
        link=None,
        adversary=None,
    )


def test_nested_options_may_be_mappings() -> None:
    config = SuperpipeConfig.from_options(link={"h2d_gb_s": 25, "latency_ms": 0.1}, adversary={"seed": 7})
    assert config == SuperpipeConfig(link=Link(h2d_gb_s=25, latency_ms=0.1), adversary=Adversary(seed=7))


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        (0, 0),
        (512, 512),
        ("512", 512),
        ("512B", 512),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("1.5GiB", 3 * 2**29),
        (" 2 MB ", 2_000_000),
        ("8gib", 2**33),
        ("1T", 10**12),
        ("0.5Ki", 512),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(size: int | str, num_bytes: int) -> None:
    assert parse_bytes(size) == num_bytes
    assert SuperpipeConfig(device_memory=size).device_memory == num_bytes


@pytest.mark.parametrize("size", ["", "GiB", "1e9", "1 2", "1PiB", "8GiBB", "0x10", None, [], 1.0, -1, True])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="is not a size in bytes"):
        parse_bytes(size)


@given(st.integers(0, 2**50))
def test_a_number_of_bytes_reads_back_from_its_text(num_bytes: int) -> None:
    assert parse_bytes(str(num_bytes)) == num_bytes


def test_a_config_cannot_be_changed_but_replaced() -> None:
    config = SuperpipeConfig(k=4, device_memory="1GiB")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 5  # type: ignore[misc]
    assert dataclasses.replace(config, k=5) == SuperpipeConfig(k=5, device_memory=2**30)
    with pytest.raises(ConfigError, match="k_prime=9 is larger than k=4"):
        dataclasses.replace(config, k_prime=9)


def test_a_config_survives_copy_and_pickle() -> None:
    config = SuperpipeConfig(k=4, k_prime=2, units=["Block"], link=Link(h2d_gb_s=1.0), adversary=Adversary())
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_caught_by_the_base_and_by_its_builtin(name: str) -> None:
    error = getattr(errors, name)
    if error is SuperpipeWarning:
        with pytest.warns(UserWarning, match="slower"):
            warnings.warn("slower", error, stacklevel=1)
        return
    assert issubclass(error, SuperpipeError)
    about_values = {"ConfigError", "PartitionError", "PlanError"}
    about_situations = {"BudgetError", "UnsupportedError", "TransferError"}
    assert issubclass(error, ValueError) is (name in about_values)
    assert issubclass(error, RuntimeError) is (name in about_situations)
