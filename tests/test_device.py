"""Recorded steps, precision and compilation. What needs a GPU is skipped without one; in its place
an emulation of a CUDA graph on the CPU checks everything that does not depend on the card."""

import dataclasses
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from oracles import RULES, generator
from test_checkpoint import interrupt
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import bpfree
from bpfree import fit
from bpfree.data import Data
from bpfree.training import device as on_device
from bpfree.training import lockstep
from bpfree.training.fit import OutOfTime

every_rule = pytest.mark.parametrize("name", RULES)


class EmulatedGraph(TorchDispatchMode):
    """A CUDA graph as its documentation has it: recording runs nothing for good, and a replay runs
    the same kernels on the same memory, whatever the host's variables have become since."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tree_leaves(value):
                    if isinstance(t, torch.Tensor) and id(t) not in self.before:
                        self.before[id(t)] = (t, t.detach().clone())
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@contextmanager
def recording(graph, stream):
    with graph:
        yield
    for tensor, before in reversed(graph.before.values()):
        tensor.copy_(before)


@pytest.fixture
def emulated(monkeypatch):
    """CUDA's recording, emulated; the list of graphs that were recorded."""
    graphs = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(lockstep, "can_record", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "graph", recording)

    def new_graph():
        graphs.append(EmulatedGraph())
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    return graphs


def train(name, data, device="cpu", seeds=(0,), **options):
    def make(g):
        return RULES[name](bpfree.mlp(64, 16, 10, dropout=0.25, generator=g), generator=g)

    options = {
        "epochs": 4, "batch_size": 16, "schedule": (1, 1, 0.1, 1).__getitem__, **options
    }  # fmt: skip
    return fit(make, data, seeds=seeds, device=device, vectorize=len(seeds) > 1, **options)


def assert_same_run(run, other, **tolerance):
    torch.testing.assert_close(run.train_loss, other.train_loss, **tolerance)
    torch.testing.assert_close(run.test_accuracy, other.test_accuracy, **tolerance)
    for rule, twin in zip(run.rules, other.rules, strict=True):
        for key, p in {**rule.params(), **rule.state()}.items():
            theirs = {**twin.params(), **twin.state()}[key]
            torch.testing.assert_close(p.cpu(), theirs.cpu(), msg=key, **tolerance)


exactly = dict(rtol=0, atol=0)


@every_rule
@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=("one", "two"))
def test_a_recorded_step_trains_as_the_step_itself(name, seeds, few_digits, monkeypatch, request):
    plain = train(name, few_digits, seeds=seeds)
    graphs = request.getfixturevalue("emulated")
    assert_same_run(train(name, few_digits, seeds=seeds), plain, **exactly)
    # one for each change of the rate: epochs 0 and 1, 2, 3
    assert len(graphs) == 3


def test_a_resumed_run_is_recorded_anew_and_ends_with_the_same_bits(
    emulated, few_digits, tmp_path, monkeypatch
):
    resumable = partial(train, "pepita", few_digits, checkpoint=tmp_path / "c")
    whole = train("pepita", few_digits)
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(OutOfTime):
            resumable()
    assert_same_run(resumable(), whole, **exactly)


def test_what_the_step_reads_from_the_host_is_recorded_for_ever(emulated):
    """The emulation would notice: that is why a change of the rate must record anew."""
    total, rate = torch.zeros(1), [1.0]
    step = on_device.Replay(lambda x: total.add_(rate[0] * x), torch.device("cpu"))
    for _ in range(5):
        step(torch.ones(1))
    rate[0] = 100.0
    step(torch.tensor([2.0]))
    assert total.item() == 7.0


# ---- the same run on every device ---------------------------------------------------------------


def elsewhere(device, source):
    """What a card draws by, as ``generator_on`` makes it: seeded by the source, which stays."""
    copy = torch.Generator().set_state(source.get_state())
    return copy.manual_seed(int(torch.randint(2**62, (), generator=copy)))


def without_dropout(digits, **options):
    def make(g):
        return bpfree.PEPITA(bpfree.mlp(64, 16, 10, generator=g), mirroring=2, generator=g)

    return fit(make, digits, epochs=3, batch_size=16, seeds=(0, 1), **options)


def test_order_and_fresh_feedback_do_not_depend_on_what_the_device_draws(
    few_digits, tmp_path, monkeypatch
):
    here = without_dropout(few_digits)
    monkeypatch.setattr(lockstep, "generator_on", elsewhere)
    assert_same_run(without_dropout(few_digits), here, **exactly)
    resumable = partial(without_dropout, few_digits, vectorize=True, checkpoint=tmp_path / "c")
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(OutOfTime):
            resumable()
    together = without_dropout(few_digits, vectorize=True)
    assert_same_run(resumable(), together, **exactly)
    with_masks = train("pepita", few_digits)  # dropout is the device's
    monkeypatch.undo()
    assert (train("pepita", few_digits).train_loss != with_masks.train_loss).any()


def test_a_generator_on_another_device_leaves_its_source_as_it_was(monkeypatch):
    source, made = generator(), []

    class Other(torch.Generator):
        def __new__(cls, device="cpu"):
            made.append(str(device))
            return super().__new__(cls)

    monkeypatch.setattr(torch, "Generator", Other)
    before = source.get_state()
    there = on_device.generator_on(torch.device("cuda"), source)
    assert made[-1] == "cuda"
    assert source.get_state().equal(before)
    assert there.initial_seed() == int(torch.randint(2**62, (), generator=source))
    assert on_device.generator_on(torch.device("cpu"), source) is source


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=("one", "two"))
def test_rules_come_back_to_where_they_were_made(few_digits, seeds, monkeypatch):
    went = []
    for kind in (bpfree.Network, bpfree.Rule):
        to = kind.to
        monkeypatch.setattr(
            kind, "to", lambda self, where, to=to: went.append((id(self), where)) or to(self, where)
        )
    run = train("pepita", few_digits, torch.device("cpu", 0), seeds)
    for one in (part for rule in run.rules for part in (rule, rule.net)):
        assert [where.index for who, where in went if who == id(one)] == [0, None]


# ---- precision and compilation ------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=("one", "two"))
def test_bf16_is_near_float32_and_not_the_same(few_digits, seeds):
    exact, rough = (
        train("backprop", few_digits, seeds=seeds, precision=p) for p in ("float32", "bf16")
    )
    difference = (rough.train_loss - exact.train_loss).abs()
    assert 0 < difference.max() < 0.02 * exact.train_loss.max()


def test_tf32_changes_nothing_on_a_cpu(few_digits):
    runs = [train("backprop", few_digits, precision=p) for p in ("float32", "tf32")]
    assert_same_run(*runs, **exactly)


@pytest.mark.parametrize("name", on_device.PRECISIONS)
def test_precision_is_what_was_asked_for_inside_and_what_it_was_outside(name):
    def now():
        return (
            torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.deterministic, torch.is_autocast_enabled("cpu"),
        )  # fmt: skip

    before = now()
    with on_device.precision(name, torch.device("cpu")):
        inside = now()
    assert now() == before
    assert inside == ("high" if name == "tf32" else "highest", name == "tf32", True, name == "bf16")


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs torch 2.9")
@pytest.mark.parametrize("where", ["", ".cuda.matmul", ".cudnn.conv", ".mkldnn.matmul"])
def test_a_precision_chosen_by_torchs_newer_settings_is_left_as_it_was(where):
    """In a process of its own: these settings cannot be taken back by the older names."""
    program = f"""if True:
        import torch
        from bpfree.training import device
        torch.backends{where}.fp32_precision = "tf32"
        now = lambda: [s.fp32_precision for s in device._fp32_settings()]
        before = now()
        for name in device.PRECISIONS:
            with device.precision(name, torch.device("cpu")):
                assert set(now()) == {{"tf32" if name == "tf32" else "ieee"}}
            assert now() == before
    """
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.compiles
def test_a_compiled_step_trains_as_the_step_itself(few_digits):
    runs = [train("pepita", few_digits, seeds=(0, 1), compile=c) for c in (False, True)]
    assert_same_run(*runs, rtol=1e-4, atol=1e-5)


# ---- on the card itself -------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_rule
@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=("one", "two"))
def test_a_gpu_trains_with_and_without_recording_to_the_same_bits(
    name, seeds, few_digits, monkeypatch
):
    recorded = train(name, few_digits, "cuda", seeds)
    monkeypatch.setattr(on_device.Replay, "__call__", lambda self, *args: self.f(*args))
    assert_same_run(train(name, few_digits, "cuda", seeds), recorded, **exactly)


# ---- every step keeps to its device, and asks the host for nothing ------------------------------


def can_pretend():
    """Whether this PyTorch indexes tensors on a GPU that is not there; old ones want a driver."""
    try:
        with FakeTensorMode():
            x = torch.zeros(2, dtype=torch.int64, device="cuda")
            return x[x].is_cuda
    except RuntimeError:
        return False


pretending = pytest.mark.skipif(not can_pretend(), reason="needs a newer PyTorch, or a GPU")


def step_on_a_pretended_card(rule, count):
    """One training step, a test and a probe, on tensors that only say that they are on a GPU.

    They have no values, so whoever asks for one fails, as whoever mixes them with the CPU's does.
    """
    pretend(make_lockstep(rule, count), partial(torch.optim.SGD, momentum=0.9))


def pretend(group, optimizer):
    count = len(group.rules)
    indices = torch.zeros(4, dtype=torch.int64).expand((4,) if count == 1 else (count, 4))
    with FakeTensorMode(), torch.no_grad():
        there = partial(tree_map, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        for name in ("params", "state", "totals"):
            setattr(group, name, there(getattr(group, name)))
        tensors = {k: v for k, v in vars(group.data).items() if isinstance(v, torch.Tensor)}
        group.data = dataclasses.replace(group.data, **there(tensors))
        group.learning = {name: group.params[name] for name in group.learning}
        group.opt = optimizer([*group.learning.values()])
        masks = lockstep._stack([group.net.masks(4, g) for g in group.generators])
        group._advance(there(indices), there(masks))
        group.test(), group.probe(4)


@pretending
@every_rule
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.processes
def test_every_step_keeps_to_its_device_and_asks_the_host_for_nothing(name, count):
    step_on_a_pretended_card(RULES[name], count)


class Curious(bpfree.Backprop):
    def signals(self, params, state, trace, error, target):
        return super().signals(params, state, trace, error / error.norm().item(), target)


class Homesick(bpfree.Backprop):
    def signals(self, params, state, trace, error, target):
        return super().signals(params, state, trace, error * torch.ones(10), target)


@pretending
@pytest.mark.parametrize("rule, message", [(Curious, "local_scalar"), (Homesick, "device")])
def test_a_rule_that_does_not_is_found(rule, message):
    with pytest.raises(Exception, match=message):
        step_on_a_pretended_card(rule, 1)


def make_lockstep(rule, count):
    made = []
    for g in map(generator, range(count)):
        net = bpfree.convnet((1, 8, 8), (3,), (8,), num_classes=10, dropout=0.5, generator=g)
        made.append(rule(net, generator=g))
    x, y = torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64)
    data = Data("fake", x, y, x, y, 1 / 16)
    generators = [generator(s) for s in range(count)]
    return lockstep.Lockstep(made, generators, data, 4, partial(torch.optim.SGD, lr=0.1))
