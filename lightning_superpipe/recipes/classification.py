"""Classification of images or texts with any architecture that transformers has for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_superpipe.recipes.module import RecipeModule
from lightning_superpipe.recipes.networks import make_network, recompute_activations

__all__ = ["Classifier", "ImageClassifier", "TextClassifier"]

Batch = dict[str, Tensor]


class Classifier(RecipeModule):
    """A network that tells classes apart.

    Args:
        kind: the transformers class that chooses the architecture.
        num_classes: how many there are.
        pretrained: folder or hub name with weights; a head of another size starts afresh.
        config: fresh weights instead: ``model_type`` and options of the architecture's configuration.
        dtype: of the weights in memory; ``"auto"`` keeps that of the file.
        recompute: keep only the input of each block in forward.
        options: ``tokenizer``, ``optimizer``, ``scheduler``, ``save_to``: see :class:`RecipeModule`.

    Raises:
        ConfigError: the network cannot be made so.
    """

    def __init__(
        self,
        kind: str,
        *,
        num_classes: int,
        pretrained: str | None = None,
        config: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        recompute: bool = False,
        **options: Any,
    ) -> None:
        changes: dict[str, Any] = {"num_labels": num_classes}
        if pretrained is not None:
            changes["ignore_mismatched_sizes"] = True  # the head
        net = make_network(kind, pretrained=pretrained, config=config, dtype=dtype, changes=changes)
        if recompute:
            recompute_activations(net)
        super().__init__(net, **options)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean nats per example; the batch holds the network's inputs and ``labels``, shape (B,)."""
        loss = F.cross_entropy(self._logits(batch), batch["labels"])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a held-out batch to the metric."""
        self.accuracy.update(self._logits(batch), batch["labels"])
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the likeliest classes, shape (B,)."""
        return self._logits(batch).argmax(-1)

    def _logits(self, batch: Batch) -> Tensor:
        """Return one number for each class, shape (B, num_classes)."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = self.net(**inputs).logits
        return logits.float()


class ImageClassifier(Classifier):
    """Batches hold ``pixel_values``, shape (B, C, H, W); see :class:`Classifier` for the arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__("AutoModelForImageClassification", **options)


class TextClassifier(Classifier):
    """Batches hold ``input_ids`` and ``attention_mask``, shape (B, T); see :class:`Classifier` for the arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__("AutoModelForSequenceClassification", **options)
