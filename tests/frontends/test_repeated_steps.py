"""transformers: the Trainer hands over whole steps, so those that the device had no room for are repeated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from lightning_superpipe import SuperpipeTrainer, SuperpipeTrainerMixin
from lightning_superpipe.errors import BudgetError
from tests.frontends.story import Story, make_model
from tests.frontends.test_transformers import DATA, are_equal, arguments, train

pytestmark = pytest.mark.filterwarnings("ignore")


class Noting(Trainer):
    """Notes numbers for its logs as it computes losses, and runs out of memory in one of its batches."""

    noted: dict[str, list[float]]
    num_noted: int
    trouble: SimpleNamespace  # no number of the Trainer's, which would be put back

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        loss: Tensor = super().compute_loss(model, inputs, *arguments, **options)
        self.noted["train"].append(loss.item())
        self.num_noted += 1
        if self.num_noted == self.trouble.fails_at:
            self.trouble.fails_at = -1
            if self.trouble.fails_in == "forward":
                raise torch.OutOfMemoryError("no room")
            loss.register_hook(self.fail)
        return loss

    def fail(self, _: Tensor) -> None:
        raise torch.OutOfMemoryError("no room")


class StreamedNoting(SuperpipeTrainerMixin, Noting):
    pass


def run(kind: Any, folder: Path, fails_in: str = "", fails_at: int = -1, **options: Any) -> Any:
    superpipe: Any = {"superpipe": {}} if issubclass(kind, SuperpipeTrainerMixin) else {}
    trainer = kind(make_model(Story()), arguments(folder, **options), train_dataset=DATA, **superpipe)
    trainer.noted, trainer.num_noted = {"train": [0.0]}, 0
    trainer.trouble = SimpleNamespace(fails_in=fails_in, fails_at=fails_at)
    return train(trainer), (trainer.noted, trainer.num_noted), trainer


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_step_that_failed_is_repeated_as_if_it_had_not_been(tmp_path: Path, fails_in: str, fails_at: int) -> None:
    wanted, noted, _ = run(Noting, tmp_path / "ordinary")
    found, noted_too, trainer = run(StreamedNoting, tmp_path / "streamed", fails_in, fails_at)
    assert are_equal(found, wanted)
    assert noted_too == noted
    assert trainer.superpipe_report().k == 2
    assert trainer.superpipe_report().num_steps == 4


def test_a_forward_is_repeated_also_between_accumulated_batches(tmp_path: Path) -> None:
    wanted, noted, _ = run(Noting, tmp_path / "ordinary", gradient_accumulation_steps=2)
    options = {"gradient_accumulation_steps": 2}
    found, noted_too, _ = run(StreamedNoting, tmp_path / "streamed", "forward", 4, **options)
    assert are_equal(found, wanted) and noted_too == noted


def test_gradients_of_earlier_batches_are_not_added_to_twice(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="Gradients of earlier batches had been there") as caught:
        run(StreamedNoting, tmp_path, "backward", 4, gradient_accumulation_steps=2)
    assert isinstance(caught.value, torch.OutOfMemoryError)


def test_without_a_smaller_plan_the_step_is_refused(tmp_path: Path) -> None:
    trainer = SuperpipeTrainer(
        make_model(Story()), arguments(tmp_path), train_dataset=DATA, superpipe={"k": 2, "activations": "keep"}
    )

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    trainer.model.lm_head.register_forward_hook(fail)
    with pytest.raises(BudgetError, match="no room for a training step with k=2"):
        trainer.train()
