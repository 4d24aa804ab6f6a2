"""The reference's logits, for models that are loaded after it is gone.

They wait in files without a name, in the type that the reference computes in. Where those would not
fit, the reference stays loaded and runs again for every model: the numbers are the same.
"""

import shutil
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxq.models.activations import ActivationStore

KEEP_CHOICES = ("auto", "yes", "no")

FREE_SHARE = 0.5
"""Part of the free disk that the logits may take before ``auto`` runs the reference again."""


class ReferenceLogits:
    """Records the logits of the reference batch by batch, and gives them again to other models.

    ``keep`` is one of KEEP_CHOICES: whether the logits are kept, or the reference itself.
    """

    def __init__(self, batches: Sequence[Tensor], keep: str) -> None:
        self.batches, self.keep = batches, keep
        self._store = ActivationStore(limit_bytes=0)
        self._kept: dict[int, Tensor] = {}
        self._reference: PreTrainedModel | None = None

    def record(self, number: int, logits_BTV: Tensor) -> Tensor:
        """Take what the reference gives for a batch, and return it.

        Raises:
            ValueError: If the disk is full.
        """
        if number == 0 and self.keep == "auto":
            self.keep = "yes" if self._needed_bytes(logits_BTV) <= _free_bytes() else "no"
        if self.keep == "yes":
            try:
                self._kept[number] = self._store.keep(logits_BTV.detach(), cold=True)
            except ValueError as error:
                raise ValueError(
                    f"the reference's logits cannot be kept in {tempfile.gettempdir()} "
                    f"({error.__cause__}); free disk space, set TMPDIR, or use --keep-logits no"
                ) from error
        return logits_BTV

    def finish(self, reference: PreTrainedModel) -> None:
        """Called when all batches are recorded; holds the reference if its logits are not kept."""
        self._reference = None if self.keep == "yes" else reference

    def replay(self, number: int, logits_BTV: Tensor) -> Tensor:
        """The reference's logits of a batch, whatever another model gave for it."""
        if self._reference is not None:
            return model_logits(self._reference, self.batches[number])
        return self._kept[number]

    def _needed_bytes(self, logits_BTV: Tensor) -> int:
        """Of all batches, judged by the logits of the first."""
        positions = sum(ids_BT[:, 1:].numel() for ids_BT in self.batches)
        return logits_BTV[0, 0].nbytes * positions


@torch.no_grad()
def model_logits(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Logits [B, T - 1, V] of the tokens after the first, in the model's type."""
    logits_BTV: Tensor = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
    return logits_BTV[:, :-1]


def _free_bytes() -> float:
    """Bytes that the logits may take."""
    return FREE_SHARE * shutil.disk_usage(tempfile.gettempdir()).free
