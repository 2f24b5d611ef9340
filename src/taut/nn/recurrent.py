"""Recurrent layers with weights of their own for what comes in and for what is remembered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import _VF, Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from taut.nn.recurrent_reads import described, set_weight, weight_names
from taut.nn.recurrent_steps import called, walk, walk_watched
from taut.nn.watching import watched

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""Mode of a recurrent layer, as torch calls it -> rows of its weights for each hidden unit."""

State = Any
"""(layers and directions, samples, units): a tensor, or for an LSTM two of them, h and c."""


class StateLinear(nn.Linear):
    """What a recurrent layer makes of its hidden state of the step before.

    Attributes:
        kept: which units of the layer as it was these are; None: all.
    """

    kept: Tensor | None

    def __init__(self, inputs: int, outputs: int, **settings: Any) -> None:
        """As an `nn.Linear`."""
        super().__init__(inputs, outputs, **settings)
        self.register_buffer("kept", None)


class Recurrent(nn.Module):
    """An `nn.LSTM`, `nn.GRU` or `nn.RNN`, of which every weight is a layer: y, state = layer(x, state).

    Takes and gives what torch's layer does: sequences of samples or a single one, packed ones, initial states or none.
    The kernel is torch's own; where a layer inside is watched or is another than it was, the steps are taken one by
    one, and these layers are called: one that is watched once for all steps, another at every step.

    Attributes:
        mode: see GATES. bidirectional, batch_first, dropout: as of torch's layer.
        inputs: for every layer what is made of its inputs: (..., inputs) -> (..., directions * gates * units), the
            forward direction first. Where the last part of a chain is an `nn.Linear`, its other parts stand in front
            of the kernel.
        states: for every layer and direction what is made of its hidden state: (..., units) -> (..., gates * units).
    """

    def __init__(self, mode: str, inputs: Sequence[nn.Module], states: Sequence[nn.Module], **settings: Any) -> None:
        """See the class.

        Args:
            mode: see GATES.
            inputs: one for every layer.
            states: one for every layer and direction.
            settings: bidirectional, batch_first, dropout.
        """
        super().__init__()
        self.mode = mode
        self.bidirectional: bool = settings.get("bidirectional", False)
        self.batch_first: bool = settings.get("batch_first", False)
        self.dropout: float = settings.get("dropout", 0.0)
        self.inputs, self.states = nn.ModuleList(inputs), nn.ModuleList(states)

    @classmethod
    def empty(cls, mode: str, sizes: Sequence[int], **settings: Any) -> Recurrent:
        """One with uninitialized weights.

        Args:
            mode: see GATES.
            sizes: inputs, hidden units, layers.
            settings: bias, bidirectional, batch_first, dropout, device, dtype.
        """
        width, units, layers = sizes
        made = {key: settings.pop(key) for key in ("bias", "device", "dtype") if key in settings}
        ways, rows = 1 + bool(settings.get("bidirectional")), GATES[mode] * units
        widths = [width, *[ways * units] * (layers - 1)]
        inputs = [nn.Linear(columns, ways * rows, **made) for columns in widths]
        return cls(mode, inputs, [StateLinear(units, rows, **made) for _ in range(layers * ways)], **settings)

    @classmethod
    def of(cls, module: nn.RNNBase) -> Recurrent:
        """What computes the same as torch's layer, with copies of its weights."""
        settings = {key: getattr(module, key) for key in ("bidirectional", "batch_first", "dropout", "bias")}
        sizes = module.input_size, module.hidden_size, module.num_layers
        built = cls.empty(module.mode, sizes, **settings, device="meta", dtype=module.weight_hh_l0.dtype)
        for number, part in enumerate(built.inputs):
            _fill(part, [(module, "ih", number, way) for way in range(built.ways)])
        for number, part in enumerate(built.states):
            _fill(part, [(module, "hh", *divmod(number, built.ways))])
        return built.train(module.training)

    @staticmethod
    def merges_trained(module: nn.RNNBase) -> bool:
        """Whether weights of torch's layer that become one are trained in part."""
        return any(
            len({getattr(module, f"{key}_ih_l{number}{end}").requires_grad for end in ("", "_reverse")}) > 1
            for number in range(module.num_layers if module.bidirectional else 0)
            for key in (("weight", "bias") if module.bias else ("weight",))
        )

    def restored(self) -> nn.RNNBase:
        """Torch's layer, with copies of the weights.

        Raises:
            ValueError: something stands in front of the kernel, or a layer inside is no plain one.
        """
        kinds: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU}
        built: nn.RNNBase = kinds.get(self.mode, nn.RNN)(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            **({} if self.mode in kinds else {"nonlinearity": self.mode.removeprefix("RNN_").lower()}),
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            device="meta",
        )
        for number in range(self.num_layers):
            parts = self._parts(number)
            if parts is None or len(parts[0]):
                raise ValueError(f"Layer {number} of the recurrent layer is no plain one.")
            for name, t in zip(weight_names(number, self.ways, bias=self.bias), parts[1], strict=True):
                way = int(name.endswith("_reverse"))
                source = self.inputs[number] if "_ih_" in name else self.states[number * self.ways + way]
                own = getattr(source, name.partition("_")[0])
                grad = own is None or own.requires_grad
                setattr(built, name, nn.Parameter(t.detach().clone(), requires_grad=grad))
        built.flatten_parameters()
        return built.train(self.training)

    @property
    def ways(self) -> int:
        """Directions."""
        return 1 + self.bidirectional

    @property
    def num_layers(self) -> int:
        """Layers, one above the other."""
        return len(self.inputs)

    @property
    def input_size(self) -> int:
        """Width of the inputs of the first layer."""
        return _width(self.inputs[0])

    @property
    def hidden_size(self) -> int:
        """Hidden units of a layer and direction."""
        return _width(self.states[0])

    @property
    def proj_size(self) -> int:
        """0: hidden states are not projected."""
        return 0

    @property
    def bias(self) -> bool:
        """Whether there are biases."""
        some = getattr(self.states[0], "bias", None)  # nearly always: asked at every call
        return isinstance(some, Tensor) or any(name.endswith("bias") for name, _ in self.named_parameters())

    def __getattr__(self, name: str) -> Any:
        """A part by its name; or a weight by the name that torch's layer has for it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            known = described(self, name) if "states" in self.__dict__.get("_modules", {}) else None
            if known is None:
                raise
        return known

    def __setattr__(self, name: str, value: Any) -> None:
        """A weight by torch's name is that of the layer inside that holds it."""
        if "states" not in self.__dict__.get("_modules", {}) or not set_weight(self, name, value):
            super().__setattr__(name, value)

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for k in range(self.num_layers) for name in weight_names(k, self.ways, bias=self.bias)]

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @property
    def all_weights(self) -> list[list[Any]]:
        """As torch's layer: the weights and biases of every layer and direction."""
        weights = iter(self._flat_weights)
        return [list(part) for part in zip(*[weights] * (4 if self.bias else 2), strict=True)]

    def flatten_parameters(self) -> None:
        """Nothing, for code that calls it: weights are joined where they are used."""

    def reset_parameters(self) -> None:
        """As torch's layer: random weights.

        Raises:
            RuntimeError: a layer inside is no plain one.
        """
        if not all(isinstance(part, nn.Linear) for part in [*self.inputs, *self.states]):
            raise RuntimeError("Weights of this layer are in factors: give random values to the layers inside.")
        scale = self.hidden_size**-0.5
        for weight in self.parameters():
            nn.init.uniform_(weight, -scale, scale)

    def fused(self) -> bool:
        """Whether torch's kernel computes all of it."""
        return all(self._parts(number) is not None for number in range(self.num_layers))

    def forward(self, input: Any, hx: State | None = None) -> tuple[Any, State]:  # noqa: A002 - torch's name
        """As torch's layer.

        Args:
            input: (T, N, inputs), (N, T, inputs) with `batch_first`, (T, inputs), or packed.
            hx: initial states; None: zeros.

        Returns:
            Outputs in the form of the input, and the last states.
        """
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            y, states = self._run(data, sizes, _reordered(hx, order))
            return PackedSequence(y, sizes, order, back), _reordered(states, back)
        if input.dim() == 3:
            return self._run(input, None, hx)
        axis = 0 if self.batch_first else 1
        hx = None if hx is None else _each(lambda t: t.unsqueeze(1), hx)
        y, states = self._run(input.unsqueeze(axis), None, hx)
        return y.squeeze(axis), _each(lambda t: t.squeeze(1), states)

    def _run(self, x: Tensor, sizes: Tensor | None, hx: State | None) -> tuple[Tensor, State]:
        """All layers; `sizes` are the samples at every step of packed inputs."""
        if hx is None:
            samples = x.size(0 if self.batch_first else 1) if sizes is None else int(sizes[0])
            zeros = x.new_zeros(self.num_layers * self.ways, samples, self.hidden_size)
            hx = (zeros, zeros) if self.mode == "LSTM" else zeros
        else:
            hx = _each(self._kept, hx)
        parts = [self._parts(number) for number in range(self.num_layers)]
        if all(part is not None and (number == 0 or len(part[0]) == 0) for number, part in enumerate(parts)):
            front = parts[0][0] if parts[0] else ()
            weights = [t for part in parts if part is not None for t in part[1]]
            return self._kernel(_through(front, x), sizes, hx, weights, self.num_layers)
        states = []
        for number, part in enumerate(parts):
            mine = _each(lambda t, n=number: t[n * self.ways : (n + 1) * self.ways], hx)
            if part is None:
                x, state = self._steps(number, x, sizes, mine)
            else:
                x, state = self._kernel(_through(part[0], x), sizes, mine, part[1], 1)
            if number < self.num_layers - 1:
                x = functional.dropout(x, self.dropout, self.training)
            states.append(state)
        if self.mode == "LSTM":
            return x, (torch.cat([h for h, _ in states]), torch.cat([c for _, c in states]))
        return x, torch.cat(states)

    def _kept(self, state: Tensor) -> Tensor:
        """Initial states of the units that are left, where code gives some of the layer as it was."""
        kept = [getattr(part, "kept", None) for part in self.states]
        if state.shape[-1] == self.hidden_size or any(index is None for index in kept):
            return state
        parts = zip(state, kept, strict=True)
        return torch.stack([part.index_select(-1, index) for part, index in parts if index is not None])

    def _kernel(
        self, x: Tensor, sizes: Tensor | None, hx: State, weights: list[Tensor], layers: int
    ) -> tuple[Tensor, State]:
        """Torch's own."""
        kernel = getattr(_VF, self.mode.lower())
        settings = self.bias, layers, self.dropout, self.training, self.bidirectional
        if sizes is None:
            y, *states = kernel(x, hx, weights, *settings, self.batch_first)
        else:
            y, *states = kernel(x, sizes, hx, weights, *settings)
        return y, tuple(states) if self.mode == "LSTM" else states[0]

    def _parts(self, number: int) -> tuple[tuple[nn.Module, ...], list[Tensor]] | None:
        """What stands in front of a layer, and its weights as torch's kernel takes them; None where it cannot."""
        chain = self.inputs[number]
        front: tuple[nn.Module, ...] = ()
        if isinstance(chain, nn.Sequential) and not watched(chain) and len(chain):
            *before, chain = chain
            front = tuple(before)
        states = [self.states[number * self.ways + way] for way in range(self.ways)]
        if not _is(chain, nn.Linear) or not all(_is(part, StateLinear) for part in states):
            return None
        weights: list[Tensor] = []
        parts: list[Any] = [chain, *states]
        bias, rows = self.bias, parts[0].weight.chunk(self.ways) if self.ways > 1 else (parts[0].weight,)
        biases = _bias(chain).chunk(self.ways) if bias else ()
        for way, part in enumerate(parts[1:]):
            weights += [rows[way], part.weight]
            if bias:
                weights += [biases[way], _bias(part)]
        return front, weights

    def _steps(self, number: int, x: Tensor, sizes: Tensor | None, hx: State) -> tuple[Tensor, State]:
        """One layer, step by step."""
        gates = self.inputs[number](x)
        time = 1 if self.batch_first else 0
        joined: tuple[Any, Any] = partial(torch.stack, dim=time), partial(torch.unbind, dim=time)
        if sizes is not None:
            joined = torch.cat, partial(torch.split, split_size_or_sections=sizes.tolist())
        join, apart = joined
        steps, rows = apart(gates), gates.shape[-1] // self.ways
        outputs, states = [], []
        for way in range(self.ways):
            own = [step.narrow(-1, way * rows, rows) for step in steps]
            start = _each(lambda t, w=way: t[w], hx)
            first = start if isinstance(start, tuple) else (start,)
            linear: Any = self.states[number * self.ways + way]
            if _is(linear, StateLinear, seen=True):
                given, state = walk_watched(self.mode, own, first, linear, joined, backward=way == 1)
            else:
                given, _, state = walk(self.mode, own, first, called(linear), backward=way == 1)
            outputs.append(given)
            states.append(state)
        y = join([torch.cat(parts, -1) for parts in zip(*outputs, strict=True)])
        last = [torch.stack(parts) for parts in zip(*states, strict=True)]
        return y, tuple(last) if self.mode == "LSTM" else last[0]

    def extra_repr(self) -> str:
        """As torch's layer."""
        ways = ", bidirectional=True" if self.bidirectional else ""
        first = ", batch_first=True" if self.batch_first else ""
        layers = f", num_layers={self.num_layers}" if self.num_layers > 1 else ""
        return f"{self.mode}, {self.input_size}, {self.hidden_size}{layers}{first}{ways}"


def without_kernel(model: nn.Module, names: Iterable[str]) -> str | None:
    """How a recurrent layer takes its steps one by one for what one of these layers inside has become, or None."""
    inside = list(names)
    for name, module in model.named_modules():
        about = isinstance(module, Recurrent) and any(path.startswith(f"{name}.") for path in inside)
        if about and not module.fused():
            return f"'{name}' would have to take its steps one by one, without torch's kernel"
    return None


def _width(chain: nn.Module) -> int:
    """Inputs of a layer, or of the first of a chain."""
    weights: Any = (getattr(part, "weight", None) for part in chain.modules())
    return next(int(t.shape[1]) for t in weights if isinstance(t, Tensor) and t.ndim == 2)


def _through(front: Sequence[nn.Module], x: Tensor) -> Tensor:
    for part in front:
        x = part(x)
    return x


def _each(function: Any, state: State) -> State:
    """The same with both states of an LSTM."""
    return tuple(function(t) for t in state) if isinstance(state, tuple | list) else function(state)


def _reordered(state: State | None, order: Tensor | None) -> State | None:
    return state if state is None or order is None else _each(lambda t: t.index_select(1, order), state)


def _is(module: nn.Module, kind: type[nn.Module], *, seen: bool = False) -> bool:
    """Whether a module is nothing but such a layer, so that its weight tells all that it computes."""
    if type(module) is not kind and not (
        parametrize.is_parametrized(module) and parametrize.type_before_parametrizations(module) is kind
    ):
        return False
    return watched(module) == seen and "forward" not in vars(module)


def _bias(part: Any) -> Tensor:
    """The bias of a layer; zeros where it alone has none."""
    own = part.bias
    bias: Tensor = part.weight.new_zeros(len(part.weight)) if own is None else own
    return bias


def _fill(part: Any, sources: Sequence[tuple[Any, str, int, int]]) -> None:
    """Give a layer copies of weights of torch's: the module, "ih" or "hh", the layer and the direction of each."""
    for key in ("weight", "bias") if part.bias is not None else ("weight",):
        held = [
            getattr(module, f"{key}_{which}_l{number}{'_reverse' if way else ''}")
            for module, which, number, way in sources
        ]
        values = torch.cat([t.detach() for t in held])
        setattr(part, key, nn.Parameter(values, requires_grad=any(t.requires_grad for t in held)))
