"""Run a model's own forward for all batches at once, stopping at every decoder layer.

Each batch runs the real forward in its own greenlet (a coroutine that can pause inside a call); a
decoder layer is a meeting point where it waits. The controller sees the calls of layer i of all
batches, so the layer's weights are read once, used for every batch and dropped. Masks, position
embeddings and state that passes from layer to layer are made by the model's own code, whatever the
family. Not threads: each would start processor threads of its own inside torch, and with more of
them than processors every operation waits for one to wake up. Hidden states are kept by an
``ActivationStore`` from the moment that they reach a layer, so those of waiting batches may lie in
files. A model on a GPU computes there: hidden states go to it for a call and to the model's own
code, and come back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from mxq.compute import CPU
from mxq.models.activations import ActivationStore


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One batch's call of one decoder layer, which computes on ``device``."""

    forward: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    device: torch.device = CPU

    @property
    def hidden(self) -> Tensor:
        """The hidden states that enter the layer, [batch, sequence, H]."""
        hidden = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(hidden, Tensor)
        return hidden

    def with_hidden(self, hidden: Tensor) -> "LayerCall":
        """The same call with other hidden states."""
        if self.args:
            return replace(self, args=(hidden, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, "hidden_states": hidden})

    def run(self) -> object:
        """Output of the layer as it is now, on its device; calling again gives the same."""
        call = self.with_hidden(self.hidden.to(self.device))
        return call.forward(*call.args, **call.kwargs)


def hidden_of(output: object) -> Tensor:
    """The hidden states in a decoder layer's output, which may be a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def with_hidden_of(output: object, hidden: Tensor) -> object:
    """A decoder layer's output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


OnLayer = Callable[[int, list[LayerCall]], list[object]]
"""``(layer, calls) -> outputs``, one output for each call."""

OnResult = Callable[[int, object], None]
"""``(batch, model output)``; the output is dropped after the call."""

OnResults = Callable[[int, Sequence[object]], None]
"""``(batch, output of each model)``; the outputs are dropped after the call."""


@dataclass(frozen=True, slots=True)
class Track:
    """One of the models that run side by side, with what to do at its layers."""

    model: nn.Module
    layers: Sequence[nn.Module]
    on_layer: OnLayer


def run_calls(calls: Sequence[LayerCall], store: ActivationStore) -> list[object]:
    """Outputs of a layer for all batches, their hidden states kept."""
    outputs = []
    for call in calls:
        output = call.run()
        hidden = store.keep(hidden_of(output), cold=True)
        outputs.append(with_hidden_of(output, hidden))
        store.release(call.hidden)
        store.release(hidden)
    return outputs


def run_in_lockstep(
    model: nn.Module,
    layers: Sequence[nn.Module],
    batches: Sequence[Tensor],
    on_layer: OnLayer,
    on_result: OnResult | None = None,
    *,
    store: ActivationStore | None = None,
) -> None:
    """Run ``model(input_ids=batch)`` for all batches, layer by layer.

    Parameters require no gradient here, so a graph grows only behind a hidden state that
    ``on_layer`` returned with ``requires_grad``. Without ``on_result`` only the first batch goes
    on after the last layer, to see that the model ends there: nobody looks at the logits.

    Raises:
        Whatever the model, ``on_layer`` or ``on_result`` raise; no pass is left waiting.
    """
    on_results = None
    if on_result is not None:
        on_results = _of_one_model(on_result)
    run_side_by_side([Track(model, layers, on_layer)], batches, on_results, store=store)


def _of_one_model(on_result: OnResult) -> OnResults:
    return lambda batch, results: on_result(batch, results[0])


def run_side_by_side(
    tracks: Sequence[Track],
    batches: Sequence[Tensor],
    on_results: OnResults | None,
    *,
    store: ActivationStore | None = None,
) -> None:
    """Run several models of the same depth, each layer of all of them before the next.

    Raises:
        Whatever a model or a callback raises; no pass is left waiting.
    """
    store = store or ActivationStore()
    runners: list[list[_Runner]] = []
    try:
        for track in tracks:
            meeting = _Meeting(store)
            originals = [layer.forward for layer in track.layers]
            for index, layer in enumerate(track.layers):
                layer.forward = meeting.stand_in(index, originals[index])
            runners.append([_Runner(track.model, batch) for batch in batches])
        _drive(tracks, runners, on_results)
    finally:
        for runner in chain.from_iterable(runners):
            runner.abandon()
        for layer in chain.from_iterable(track.layers for track in tracks):
            vars(layer).pop("forward", None)


def _drive(
    tracks: Sequence[Track], runners: "Sequence[Sequence[_Runner]]", on_results: OnResults | None
) -> None:
    for runner in chain.from_iterable(runners):
        runner.advance(None)
    layers = len(tracks[0].layers)
    for index in range(layers):
        for track, members in zip(tracks, runners, strict=True):
            _visit(track, index, members)
        if index < layers - 1:
            for runner in chain.from_iterable(runners):
                runner.advance(runner.waiting_output)
    for batch, members in enumerate(zip(*runners, strict=True)):
        results = [runner.end() for runner in members]
        if on_results is None:
            break
        on_results(batch, results)


def _visit(track: Track, index: int, runners: "Sequence[_Runner]") -> None:
    calls = [runner.call_of(index) for runner in runners]
    for runner, output in zip(runners, track.on_layer(index, calls), strict=True):
        runner.waiting_output = output


class _Meeting:
    """Stand-ins of the layers, where the greenlet of a batch waits."""

    def __init__(self, store: ActivationStore) -> None:
        self.store = store

    def stand_in(self, index: int, forward: Callable[..., object]) -> Callable[..., object]:
        def wait(*args: object, **kwargs: object) -> object:
            runner = getcurrent()
            assert isinstance(runner, _Runner)
            call = LayerCall(forward, args, kwargs)
            call = replace(call, device=call.hidden.device)
            call = call.with_hidden(runner.kept(call.hidden, self.store))
            self.store.release(call.hidden)
            output = runner.meet(index, call)
            return runner.given(output, call.device)

        return wait


class _Runner(greenlet):
    """One batch's forward pass, stopped at each layer."""

    def __init__(self, model: nn.Module, batch: Tensor) -> None:
        super().__init__()
        self.model, self.batch = model, batch
        self.call: tuple[int, LayerCall] | None = None
        self.waiting_output: object = None
        self.result: object = None
        self._given: tuple[Tensor, Tensor] | None = None

    def run(self) -> None:
        try:
            with torch.enable_grad():
                self.result = self.model(input_ids=self.batch, use_cache=False)
        finally:
            self.call = self._given = None

    def kept(self, hidden: Tensor, store: ActivationStore) -> Tensor:
        """What the store has of hidden states; nothing is copied if the model left them alone."""
        given, self._given = self._given, None
        if given is not None and given[0] is hidden:
            return given[1]
        return store.keep(hidden, cold=True)

    def given(self, output: object, device: torch.device) -> object:
        """A layer's output as the model's own code gets it: on the model's device."""
        hidden = hidden_of(output)
        self._given = hidden.to(device), hidden
        return with_hidden_of(output, self._given[0])

    def meet(self, index: int, call: LayerCall) -> object:
        """Called by the model: wait for the controller's output of this layer."""
        self.call = (index, call)
        assert self.parent is not None
        with _own_grad_mode():
            self.parent.switch()
        output, self.waiting_output = self.waiting_output, None
        return output

    def advance(self, output: object) -> None:
        """Called by the controller: let the model run to the next layer or to its end."""
        self.call, self.waiting_output = None, output
        self.parent = getcurrent()  # where a switch back, the end and any error go
        with _own_grad_mode():
            self.switch()

    def call_of(self, index: int) -> LayerCall:
        if self.call is None or self.call[0] != index:
            found = "the end" if self.call is None else f"layer {self.call[0]}"
            raise RuntimeError(f"the model went to {found} where layer {index} was expected")
        return self.call[1]

    def end(self) -> object:
        """Called by the controller after the last layer: the model's output."""
        self.advance(self.waiting_output)
        if self.call is not None:
            raise RuntimeError(f"the model went to layer {self.call[0]} where the end was expected")
        result, self.result = self.result, None
        return result

    def abandon(self) -> None:
        """Called by the controller: end a model that waits, which is no error."""
        if self:
            with _own_grad_mode():
                self.throw()


@contextmanager
def _own_grad_mode() -> Iterator[None]:
    """Whether gradients are on is the thread's, so each side restores its own after a switch."""
    enabled = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)
