"""What cannot be done as asked ends with one paragraph that names the key and what is allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.app.conftest import Ran

Command = Callable[..., Ran]

MISTAKES = [
    # words, what the paragraph says
    (["trian", "experiment=tiny"], ["'trian' is no mode", "did you mean 'train'?"]),
    (["mode=fly", "experiment=tiny"], ["mode=fly", "train, eval, predict, plan, bench, trace"]),
    ([], ["model and data", "experiment=NAME", "tiny", "language_model"]),
    (["experiment=tyny"], ["experiment=tyny", "did you mean 'tiny'?", "language_model"]),
    (["superpipe=balance"], ["superpipe=balance", "did you mean 'balanced'?", "low_memory"]),
    (["experimnt=tiny"], ["'experimnt'", "did you mean 'experiment'?"]),
    (["superpipe.kprime=2"], ["'superpipe.kprime'", "did you mean 'superpipe.k_prime'?"]),
    (["+superpipe.kprime=2"], ["`superpipe`", "'kprime'", "did you mean 'k_prime'?"]),
    (["superpipe.banana=2"], ["'superpipe.banana'", "superpipe.k_prime", "superpipe.device_memory"]),
    (["superpipe.link.h2d=2"], ["superpipe.link", "h2d_gb_s, d2h_gb_s, latency_ms"]),
    (["superpipe.link={h2d: 2}"], ["link.h2d", "did you mean 'link.h2d_gb_s'?"]),
    (["superpipe.k=two"], ["k='two'", "at least 1", "'auto'"]),
    (["superpipe.k=0"], ["k=0", "at least 1", "'auto'"]),
    (["superpipe.k=true"], ["k=True", "at least 1"]),
    (["superpipe.k=2", "superpipe.k_prime=3"], ["k_prime=3", "k=2", "1 <= k_prime <= 2"]),
    (["superpipe.device_memory=lots"], ["'lots'", "8GiB"]),
    (["superpipe.device_memory=1KiB"], ["1.0 KiB", "blocks.0", "allow at least"]),
    (["superpipe.pin_memory=maybe"], ["pin_memory='maybe'", "true, false and 'auto'"]),
    (["superpipe.record_step=-1"], ["record_step=-1", "0 or more"]),
    (["superpipe.units=Nonsense"], ["'Nonsense'"]),
    (["superpipe.adversary={poison: true, seeds: 1}"], ["adversary.seeds", "did you mean 'adversary.seed'?"]),
    (["model.wdith=3"], ["'model.wdith'", "did you mean 'model.width'?"]),
    (["+model.wdith=3"], ["`model.wdith`", "Tiny", "did you mean 'width'?"]),
    (["+trainer.max_stps=3"], ["`trainer.max_stps`", "did you mean 'max_steps'?"]),
    (["model._target_=tests.app.tiny.Tinny"], ["tests.app.tiny.Tinny", "model"]),
    (["model._target_=null"], ["model"]),
    (["ckpt_path=nowhere.ckpt"], ["nowhere.ckpt"]),
    (["superpipe.k=["], ["["]),
    (["model=null"], ["Config group override", "--help"]),
    (["seed=${sead}"], ["seed", "sead"]),
    (["optimizer.lr=fast"], ["optimizer", "fast"]),
]


@pytest.mark.parametrize(("words", "parts"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_ends_with_a_paragraph(superpipe: Command, words: list[str], parts: list[str]) -> None:
    names_experiment = any(word.startswith(("experiment", "experimnt")) for word in words) or not words
    ran = superpipe(*words, *([] if names_experiment else ["experiment=tiny"]))
    assert isinstance(ran.status, str), ran.out
    assert ran.status.startswith("superpipe: ")
    assert [part for part in parts if part not in ran.status] == []
    assert "Traceback" not in ran.status + ran.out
    assert len(ran.status) < 1500


def test_a_missing_library_is_named(superpipe: Command) -> None:
    logger = "+logger.mine={_target_: lightning.pytorch.loggers.CometLogger}"
    try:
        import comet_ml  # noqa: F401
    except ModuleNotFoundError:
        assert "comet" in str(superpipe("experiment=tiny", logger).status)
    else:
        pytest.skip("comet_ml is installed")


def test_an_error_in_the_users_own_code_keeps_its_traceback(superpipe: Command) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        superpipe("experiment=tiny", "data.width=5")


def test_the_whole_traceback_can_be_asked_for(superpipe: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="k_prime=3 is larger than k=2"):
        superpipe("experiment=tiny", "superpipe.k=2", "superpipe.k_prime=3")
