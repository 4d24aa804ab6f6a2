"""Lock-step: all batches meet at each layer, and nothing is left behind when something fails."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mxq.models.lockstep as lockstep_module
from mxq.models.activations import ActivationStore
from mxq.models.lockstep import LayerCall, hidden_of, run_calls, run_in_lockstep


class Layer(nn.Module):
    """x -> 2 x + shift; keeps count of its calls."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.calls = shift, 0

    def forward(self, hidden_states, scale=2.0):
        self.calls += 1
        return (scale * hidden_states + self.shift, "cache")


class Model(nn.Module):
    """Embeds ids as themselves and runs its layers in the order of ``path``."""

    def __init__(self, path=(0, 1, 2), *, by_keyword=False):
        super().__init__()
        self.layers = nn.ModuleList(Layer(shift) for shift in (1.0, 10.0, 100.0))
        self.path, self.by_keyword, self.log = path, by_keyword, []

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        hidden = input_ids.float()[..., None]
        for index in self.path:
            self.log.append((int(input_ids[0, 0]), index))
            layer = self.layers[index]
            output = layer(hidden_states=hidden) if self.by_keyword else layer(hidden, scale=2.0)
            hidden = hidden_of(output)
        if bool((input_ids < 0).any()):
            raise RuntimeError("an id is negative")
        return SimpleNamespace(logits=hidden)


BATCHES = [torch.tensor([[1, 2]]), torch.tensor([[3, 4], [5, 6]]), torch.tensor([[7]])]


def run_all(layer, calls):
    return [call.run() for call in calls]


def lockstep(model, batches=None, on_layer=run_all, on_result=None):
    batches = BATCHES if batches is None else batches
    run_in_lockstep(model, list(model.layers), batches, on_layer, on_result)


@pytest.fixture(autouse=True)
def _every_pass_ends(monkeypatch):
    passes = []

    class Runner(lockstep_module._Runner):
        def __init__(self, *args):
            super().__init__(*args)
            passes.append(self)

    monkeypatch.setattr(lockstep_module, "_Runner", Runner)
    yield
    assert not any(passes)  # true of a greenlet that has begun and not ended


def test_gradients_are_on_for_the_model_alone():
    model, seen = Model(), []

    def on_layer(layer, calls):
        seen.append(torch.is_grad_enabled())
        with torch.enable_grad() if layer == 1 else torch.no_grad():
            return run_all(layer, calls)

    model.layers[0].register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with torch.no_grad():
        lockstep(model, on_layer=on_layer)
        assert not torch.is_grad_enabled()
    assert seen == [True, True, True, False, False, False]


def test_a_layer_that_fails_leaves_gradients_as_they_were():
    def fail(layer, calls):
        raise RuntimeError("no")

    with torch.no_grad():
        with pytest.raises(RuntimeError, match="no"):
            lockstep(Model(), on_layer=fail)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("by_keyword", [False, True])
def test_results_are_those_of_the_model_itself(by_keyword):
    model, found = Model(by_keyword=by_keyword), {}
    lockstep(model, on_result=lambda batch, result: found.update({batch: result.logits}))
    assert list(found) == [0, 1, 2]
    # ((2 x + 1) 2 + 10) 2 + 100 = 8 x + 124, by hand.
    for batch, ids in enumerate(BATCHES):
        assert torch.equal(found[batch], 8.0 * ids[..., None] + 124)


def test_a_layer_is_visited_once_with_the_calls_of_all_batches_in_order():
    seen = []

    def on_layer(layer, calls):
        seen.append((layer, [call.hidden.shape[:2] for call in calls]))
        return run_all(layer, calls)

    model = Model()
    lockstep(model, on_layer=on_layer)
    shapes = [ids.shape for ids in BATCHES]
    assert seen == [(0, shapes), (1, shapes), (2, shapes)]
    assert [layer.calls for layer in model.layers] == [3, 3, 3]


def test_no_batch_goes_ahead_to_the_next_layer():
    model, done = Model(), []

    def on_layer(layer, calls):
        # All three batches have reached this layer and none has reached a later one.
        assert [index for _, index in model.log[-3:]] == [layer] * 3
        assert len(model.log) == 3 * (layer + 1)
        done.append(layer)
        return run_all(layer, calls)

    lockstep(model, on_layer=on_layer)
    assert done == [0, 1, 2]


def test_a_result_is_given_before_the_next_batch_ends():
    model, order = Model(), []
    lockstep(model, on_result=lambda batch, result: order.append((batch, result.logits.numel())))
    assert order == [(0, 2), (1, 4), (2, 1)]


def test_what_on_layer_returns_is_what_the_model_goes_on_with():
    found = []

    def on_layer(layer, calls):
        return [(torch.full_like(call.hidden, float(layer)), "cache") for call in calls]

    lockstep(Model(), on_layer=on_layer, on_result=lambda b, result: found.append(result.logits))
    assert all((logits == 2.0).all() for logits in found)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_call_can_be_run_again_and_with_other_hidden_states(by_keyword):
    found = []

    def on_layer(layer, calls):
        first, again = (hidden_of(calls[0].run()) for _ in range(2))
        other = hidden_of(calls[0].with_hidden(torch.zeros(1, 1)).run())
        found.append((torch.equal(first, again), other.item()))
        return run_all(layer, calls)

    lockstep(Model(by_keyword=by_keyword), on_layer=on_layer)
    assert found == [(True, 1.0), (True, 10.0), (True, 100.0)]


def test_other_arguments_survive_other_hidden_states():
    call = LayerCall(lambda *args, **kwargs: (args, kwargs), (torch.zeros(1), "mask"), {"scale": 3})
    args, kwargs = call.with_hidden(torch.ones(1)).run()
    assert (args[0].item(), args[1], kwargs) == (1.0, "mask", {"scale": 3})


def test_a_graph_grows_behind_a_hidden_state_that_wants_one():
    grads = []

    def on_layer(layer, calls):
        with torch.no_grad():
            outputs = run_all(layer, calls)
        if layer == 1:
            kept[:] = [hidden_of(output).requires_grad_() for output in outputs]
        return outputs if layer < 2 else run_all(layer, calls)

    def on_result(batch, result):
        grads.append(torch.autograd.grad(result.logits.sum(), kept[batch])[0])

    kept = []
    lockstep(Model(), on_layer=on_layer, on_result=on_result)
    # Only the last layer, x -> 2 x + 100, lies behind the kept states.
    assert all((grad == 2.0).all() for grad in grads)


def test_waiting_hidden_states_are_in_the_store_from_the_first_layer_on(tmp_path):
    store, found = ActivationStore(0, tmp_path), {}

    def on_layer(layer, calls):
        assert all(store.is_on_disk(call.hidden) for call in calls)
        outputs = run_calls(calls, store)
        assert all(store.is_on_disk(hidden_of(output)) for output in outputs)
        return outputs

    model = Model()
    run_in_lockstep(
        model,
        list(model.layers),
        BATCHES,
        on_layer,
        lambda batch, result: found.update({batch: result.logits.clone()}),
        store=store,
    )
    for batch, ids in enumerate(BATCHES):
        assert torch.equal(found[batch], 8.0 * ids[..., None] + 124)
    # One layer's inputs and outputs of seven ids, and nothing after the run.
    assert (store.peak_disk_bytes, store.disk_bytes) == (2 * 7 * 4, 0)


def test_layers_have_their_own_forward_again_afterwards():
    model = Model()
    lockstep(model)
    assert all("forward" not in vars(layer) for layer in model.layers)
    logits = model(input_ids=BATCHES[2], use_cache=False).logits
    assert logits.item() == 8 * 7 + 124


@pytest.mark.parametrize("layer_that_fails", [0, 1, 2])
def test_an_exception_in_on_layer_is_raised(layer_that_fails):
    def on_layer(layer, calls):
        if layer == layer_that_fails:
            raise ValueError("weights are NaN")
        return run_all(layer, calls)

    model = Model()
    with pytest.raises(ValueError, match="weights are NaN"):
        lockstep(model, on_layer=on_layer)
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_an_exception_in_on_result_is_raised():
    def on_result(batch, result):
        if batch == 1:
            raise ValueError("the result is not finite")

    with pytest.raises(ValueError, match="the result is not finite"):
        lockstep(Model(), on_result=on_result)


def test_an_exception_in_the_model_is_raised():
    batches = [BATCHES[0], torch.tensor([[-1]]), BATCHES[2]]
    with pytest.raises(RuntimeError, match="an id is negative"):
        lockstep(Model(), batches, on_result=lambda batch, result: None)


def test_only_one_batch_runs_behind_the_layers_where_no_result_is_wanted():
    batches = [BATCHES[0], torch.tensor([[-1]]), BATCHES[2]]  # fails behind its last layer
    visits = []
    lockstep(Model(), batches, lambda layer, calls: visits.append(layer) or run_all(layer, calls))
    assert visits == [0, 1, 2]
    with pytest.raises(RuntimeError, match="an id is negative"):
        lockstep(Model(), batches[1:])


def test_an_exception_before_the_first_layer_is_raised():
    with pytest.raises(IndexError, match="out of bounds"):
        lockstep(Model(), [BATCHES[0], torch.zeros(1, 0, dtype=torch.int64)])  # no first token


def test_too_few_outputs_are_an_error():
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        lockstep(Model(), on_layer=lambda layer, calls: run_all(layer, calls)[:1])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((0, 2), "the model went to layer 2 where layer 1 was expected"),
        ((1, 0, 2), "the model went to layer 1 where layer 0 was expected"),
        ((0, 1), "the model went to the end where layer 2 was expected"),
        ((), "the model went to the end where layer 0 was expected"),
        ((0, 0, 1, 2), "the model went to layer 0 where layer 1 was expected"),
    ],
)
def test_a_family_that_skips_or_repeats_a_layer_is_an_error(path, message):
    with pytest.raises(RuntimeError, match=message):
        lockstep(Model(path))


@pytest.mark.parametrize("again", [0, 2])
def test_a_family_that_runs_a_layer_after_the_last_is_an_error(again):
    with pytest.raises(
        RuntimeError, match=f"the model went to layer {again} where the end was expected"
    ):
        lockstep(Model((0, 1, 2, again)))
