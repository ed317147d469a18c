"""The table of all blueprints: one row each, in the order of their numbers.

- BP001-BP010 the safe pool, one cheap and well-known block of each kind of computation;
- BP011-BP020 convolutions; BP021-BP026 attention over channels and space; BP027-BP035 attention over positions,
  mixtures, dynamic and recurrent blocks;
- BP036-BP042 experimental, BP043-BP050 quarantined: the tier follows from the number.

Blocks for sequences are causal.
"""

from __future__ import annotations

from esper_ray.contracts.ports import SlotKind
from esper_ray.karn import costs
from esper_ray.karn import costs_attention as attention
from esper_ray.karn.recipe import ALL_KINDS, Blueprint, Bound

SAFE_POOL = 10
_CONV: tuple[SlotKind, ...] = ("conv",)
_SEQUENCE: tuple[SlotKind, ...] = ("sequence",)
_PLACES: tuple[SlotKind, ...] = ("conv", "sequence")
# Attention over P positions keeps P * P scores a head and sample; beyond this they outgrow what a graft is worth.
_ATTENDED = (2, 1024)


def _gain(default: float = 0.5) -> dict[str, Bound]:
    return {"scale": Bound(0.05, 1.0, default, "initial gain per channel of the branch's output")}


def _expansion(default: float) -> dict[str, Bound]:
    return {"expansion": Bound(0.25, 4.0, default, "inner width as a multiple of the channels"), **_gain()}


def _kernel(default: float, smallest: float = 3) -> Bound:
    return Bound(smallest, 7, default, "side of the (odd) convolution kernel")


def _heads(default: float = 4) -> Bound:
    return Bound(1, 16, default, "attention heads, rounded down to a divisor of the channels")


def _ratio(least: float, default: float) -> Bound:
    return Bound(least, 1.0, default, "inner width as a share of the channels")


BLUEPRINTS: tuple[Blueprint, ...] = (
    Blueprint(
        "BP001", "identity", "scaling", ALL_KINDS, costs.identity,
        "A branch that adds nothing: the placebo of every comparison.", "He et al. 2016, arXiv:1603.05027",
        operations=1,
    ),
    Blueprint(
        "BP002", "channel-affine", "scaling", ALL_KINDS, costs.affine,
        "A gain and a shift per channel.", "LayerScale: Touvron et al. 2021, arXiv:2103.17239", _gain(), operations=2,
    ),
    Blueprint(
        "BP003", "normalised-activation", "normalisation", ALL_KINDS, costs.normalised_activation,
        "Group normalisation and a ReLU: competition within a sample, without mixing channels by weights.",
        "Wu & He 2018, arXiv:1803.08494", _gain(0.75), operations=3,
    ),
    Blueprint(
        "BP004", "pointwise-mlp", "pointwise", ALL_KINDS, costs.pointwise_mlp,
        "Two pointwise maps with a GELU between them: mixes channels at each position.",
        "Network in Network: Lin et al. 2013, arXiv:1312.4400; MLP-Mixer, arXiv:2105.01601", _expansion(1.0),
        operations=5,
    ),
    Blueprint(
        "BP005", "low-rank-adapter", "low-rank", ALL_KINDS, costs.low_rank,
        "A linear pointwise map of low rank.", "LoRA: Hu et al. 2021, arXiv:2106.09685; adapters, arXiv:1803.10082",
        {"rank": Bound(1, 64, 4, "rank of the map, at most the channels"), **_gain()}, operations=3,
    ),
    Blueprint(
        "BP006", "depthwise-mlp", "depthwise", _CONV, costs.depthwise_mlp,
        "A depthwise convolution, then a pointwise MLP: a ConvNeXt block.", "Liu et al. 2022, arXiv:2201.03545",
        {"kernel": _kernel(5), **_expansion(2.0)}, operations=6,
    ),
    Blueprint(
        "BP007", "squeeze-excitation", "channel attention", _CONV, costs.squeeze_excitation,
        "Channels turned up or down by what the whole map holds.", "Hu et al. 2018, arXiv:1709.01507",
        {"ratio": _ratio(0.0625, 0.25), **_gain(0.75)}, operations=8,
    ),
    Blueprint(
        "BP008", "bottleneck", "residual", _CONV, costs.bottleneck,
        "Narrow, convolve, widen: a pre-activation bottleneck.", "He et al. 2016, arXiv:1603.05027",
        {"ratio": _ratio(0.125, 0.5), **_gain()}, operations=10,
    ),
    Blueprint(
        "BP009", "residual-basic", "residual", _CONV, costs.basic,
        "Two 3x3 convolutions, each after normalisation and ReLU: a pre-activation residual block.",
        "He et al. 2016, arXiv:1603.05027",
        {"width": Bound(0.25, 2.0, 1.0, "inner width as a multiple of the channels"), **_gain()}, operations=7,
    ),
    Blueprint(
        "BP010", "gated-mlp", "gated feed-forward", ALL_KINDS, costs.gated_mlp,
        "A pointwise map whose values are gated by another one (SwiGLU).", "Shazeer 2020, arXiv:2002.05202",
        _expansion(1.0), operations=6,
    ),
    Blueprint(
        "BP011", "grouped-shuffle", "grouped convolution", _CONV, costs.grouped,
        "Two grouped 3x3 convolutions with the channels shuffled between them.",
        "ShuffleNet: Zhang et al. 2018, arXiv:1707.01083; ResNeXt, arXiv:1611.05431",
        {"groups": Bound(2, 32, 4, "groups of each convolution"), **_gain()}, operations=8,
    ),
    Blueprint(
        "BP012", "dilated", "dilated convolution", _CONV, costs.dilated,
        "A 3x3 convolution over every second position, then a pointwise map: a wide view for few weights.",
        "Yu & Koltun 2016, arXiv:1511.07122", _gain(), 3, operations=7,
    ),
    Blueprint(
        "BP013", "single-convolution", "convolution", _CONV, costs.single,
        "One convolution after normalisation and ReLU.", "He et al. 2016, arXiv:1603.05027",
        {"kernel": _kernel(3), **_gain()}, operations=4,
    ),
    Blueprint(
        "BP014", "inverted-bottleneck", "depthwise", _CONV, costs.inverted,
        "Widen, convolve depthwise, narrow: a mobile inverted bottleneck.", "Sandler et al. 2018, arXiv:1801.04381",
        _expansion(2.0), operations=9,
    ),
    Blueprint(
        "BP015", "factorised", "convolution", _CONV, costs.factorised,
        "A horizontal and a vertical convolution in a row.", "Szegedy et al. 2016, arXiv:1512.00567",
        {"kernel": _kernel(3), **_gain()}, operations=7,
    ),
    Blueprint(
        "BP016", "dilated-pyramid", "dilated convolution", _CONV, costs.dilated_pyramid,
        "Depthwise convolutions at three dilations side by side, mixed pointwise: three scales at once.",
        "Atrous spatial pyramids: Chen et al. 2017, arXiv:1706.05587", _gain(), 4, offered=False, operations=8,
    ),
    Blueprint(
        "BP017", "half-resolution", "multi-scale", _CONV, costs.half_resolution,
        "A 3x3 convolution of the map at half its resolution: a wider view for a quarter of the FLOPs.",
        "Octave convolution: Chen et al. 2019, arXiv:1904.05049", _gain(), 4, offered=False, operations=7,
    ),
    Blueprint(
        "BP018", "ghost", "depthwise", _CONV, costs.ghost,
        "Half of the channels by a pointwise map, the rest by a cheap depthwise convolution of those.",
        "Han et al. 2020, arXiv:1911.11907", _gain(), 2, offered=False, operations=8,
    ),
    Blueprint(
        "BP019", "hierarchical", "multi-scale", _CONV, costs.hierarchical,
        "Parts of the channels convolved one after the other, each with the result of the one before.",
        "Res2Net: Gao et al. 2019, arXiv:1904.01169",
        {"scales": Bound(2, 8, 4, "parts, rounded down to a divisor of the channels"), **_gain()}, 2, offered=False,
        operations=14,
    ),
    Blueprint(
        "BP020", "shift", "pointwise", _CONV, costs.shift,
        "Channels moved by one position in four directions, then a pointwise MLP: a view of 3x3 without weights.",
        "Wu et al. 2018, arXiv:1711.08141", _expansion(1.0), 2, offered=False, operations=7,
    ),
    Blueprint(
        "BP021", "spatial-gate", "spatial attention", _CONV, costs.spatial_gate,
        "Positions turned up or down by a convolution over the map's mean and maximum of channels.",
        "CBAM: Woo et al. 2018, arXiv:1807.06521", {"kernel": _kernel(5), **_gain(0.75)}, 2, operations=8,
    ),
    Blueprint(
        "BP022", "neighbour-gate", "channel attention", _CONV, attention.neighbour_gate,
        "Channels turned up or down by the means of their neighbours: a handful of weights in all.",
        "ECA-Net: Wang et al. 2020, arXiv:1910.03151", {"kernel": _kernel(3), **_gain(0.75)}, 2, offered=False,
        operations=6,
    ),
    Blueprint(
        "BP023", "coordinate-gate", "spatial attention", _CONV, attention.coordinate_gate,
        "Gates from the means of each row and of each column: channel attention that knows where.",
        "Hou et al. 2021, arXiv:2103.02907", {"ratio": _ratio(0.0625, 0.25), **_gain(0.75)}, 2, offered=False,
        operations=12,
    ),
    Blueprint(
        "BP024", "global-context", "channel attention", _CONV, attention.global_context,
        "One vector for the map, pooled by a learned attention over positions, added everywhere.",
        "GCNet: Cao et al. 2019, arXiv:1904.11492", {"ratio": _ratio(0.0625, 0.25), **_gain()}, 2, offered=False,
        operations=9,
    ),
    Blueprint(
        "BP025", "style-gate", "channel attention", _CONV, attention.style_gate,
        "Each channel turned up or down by its own mean and deviation over the map.",
        "SRM: Lee et al. 2019, arXiv:1903.10829", _gain(0.75), 2, offered=False, operations=10,
    ),
    Blueprint(
        "BP026", "large-kernel-gate", "spatial attention", _CONV, attention.large_kernel_gate,
        "Each value gated by a wide view of its surroundings: a depthwise, a dilated and a pointwise convolution.",
        "Visual attention network: Guo et al. 2022, arXiv:2202.09741", {"kernel": _kernel(5), **_gain(0.75)}, 3,
        offered=False, operations=6,
    ),
    Blueprint(
        "BP027", "self-attention", "attention", _PLACES, attention.self_attention,
        "Every position looks at all others (in a sequence: at those before it).",
        "Vaswani et al. 2017, arXiv:1706.03762", {"heads": _heads(), **_gain()}, 2, _ATTENDED, offered=False,
        operations=13,
    ),
    Blueprint(
        "BP028", "linear-attention", "attention", _PLACES, attention.linear_attention,
        "Attention without the softmax, whose cost on maps grows with the positions and not with their square.",
        "Katharopoulos et al. 2020, arXiv:2006.16236", {"heads": _heads(), **_gain()}, 2, _ATTENDED, offered=False,
        operations=19,
    ),
    Blueprint(
        "BP029", "causal-mlp", "depthwise", _SEQUENCE, attention.causal_mlp,
        "A depthwise convolution over the last positions, then a pointwise MLP.",
        "Wu et al. 2019, arXiv:1901.10430; ConvNeXt, arXiv:2201.03545", {"kernel": _kernel(5), **_expansion(2.0)},
        positions=(2, 0), operations=7,
    ),
    Blueprint(
        "BP030", "axial-attention", "attention", _CONV, attention.axial_attention,
        "Every position looks at its row and at its column.", "Ho et al. 2019, arXiv:1912.12180",
        {"heads": _heads(), **_gain()}, 2, (4, 16_384), offered=False, operations=24,
    ),
    Blueprint(
        "BP031", "memory", "attention", ALL_KINDS, costs.memory,
        "Cross-attention to learned keys and values in the place of other positions.",
        "External attention: Guo et al. 2021, arXiv:2105.02358; Sukhbaatar et al. 2019, arXiv:1907.01470",
        {"places": Bound(4, 128, 32, "learned keys and values"), **_gain()}, offered=False, operations=6,
    ),
    Blueprint(
        "BP032", "mixture", "mixture", ALL_KINDS, costs.mixture,
        "Several small MLPs and a softmax at each position that says how much each contributes.",
        "Shazeer et al. 2017, arXiv:1701.06538",
        {
            "experts": Bound(2, 8, 4, "small MLPs"),
            "expansion": Bound(0.125, 2.0, 0.5, "inner width of each as a multiple of the channels"),
            **_gain(),
        },
        offered=False, operations=10,
    ),
    Blueprint(
        "BP033", "dynamic-depthwise", "dynamic convolution", _CONV, costs.dynamic_depthwise,
        "Several depthwise kernels, mixed for each sample by what its map holds.",
        "Chen et al. 2020, arXiv:1912.03458",
        {"kernels": Bound(2, 8, 4, "kernels that are mixed"), **_gain()}, 2, offered=False, operations=12,
    ),
    Blueprint(
        "BP034", "dynamic-convolution", "dynamic convolution", _SEQUENCE, attention.dynamic_convolution,
        "A convolution over the last positions whose kernel each position makes for itself.",
        "Wu et al. 2019, arXiv:1901.10430",
        {"kernel": Bound(3, 15, 5, "positions that are seen (odd)"), "heads": _heads(), **_gain()}, positions=(2, 0),
        operations=10,
    ),
    Blueprint(
        "BP035", "state-space", "state space", _SEQUENCE, attention.state_space,
        "A convolution with the whole past whose kernel is a sum of decaying exponentials.",
        "S4D: Gu et al. 2022, arXiv:2206.11893",
        {"states": Bound(2, 32, 8, "decays per channel"), **_gain()}, positions=_ATTENDED, operations=19,
    ),
    Blueprint(
        "BP036", "gated-recurrence", "recurrent", _SEQUENCE, attention.gated_recurrence,
        "A recurrent unit whose gates depend on the input alone, so that all positions are computed at once.",
        "minGRU: Feng et al. 2024, arXiv:2410.01201", _gain(), positions=(2, 4096), operations=24,
    ),
    Blueprint(
        "BP037", "selective-state-space", "state space", _SEQUENCE, attention.selective_state_space,
        "A linear recurrence whose decay, input and readout are functions of the input.",
        "Mamba-2: Dao & Gu 2024, arXiv:2405.21060",
        {"states": Bound(4, 64, 16, "size of the state"), "heads": _heads(), **_gain()}, positions=_ATTENDED,
        operations=20,
    ),
    Blueprint(
        "BP038", "neighbour-graph", "graph attention", _CONV, attention.neighbour_graph,
        "Each position attends to its eight neighbours and itself by additive scores.",
        "GAT: Velickovic et al. 2018, arXiv:1710.10903", _gain(), 2, operations=18,
    ),
    Blueprint(
        "BP039", "conditional-low-rank", "dynamic convolution", ALL_KINDS, costs.conditional_low_rank,
        "A linear map of low rank that is another one for each input.",
        "Hypernetworks: Ha et al. 2016, arXiv:1609.09106; CondConv, arXiv:1904.04971",
        {"rank": Bound(2, 64, 8, "rank of the map, at most the channels"), **_gain()}, operations=8,
    ),
    Blueprint(
        "BP040", "deformable", "convolution", _CONV, costs.deformable,
        "A 3x3 convolution whose positions move by offsets that the map itself gives.",
        "Dai et al. 2017, arXiv:1703.06211", _gain(), 3, operations=19,
    ),
    Blueprint(
        "BP041", "spectral-filter", "spectral", _CONV, costs.spectral_filter,
        "A weight for each frequency of each channel: a global view by a cosine transform.",
        "GFNet: Rao et al. 2021, arXiv:2107.00645; FcaNet, arXiv:2012.11879", _gain(), 2, (4, 4096), operations=23,
    ),
    Blueprint(
        "BP042", "weight-tied", "residual", _CONV, costs.weight_tied,
        "The same convolution again and again: depth without parameters.",
        "Deep equilibrium models: Bai et al. 2019, arXiv:1909.01377",
        {"steps": Bound(2, 6, 3, "how often it is applied"), **_gain()}, operations=12,
    ),
    Blueprint(
        "BP043", "exploding", "quarantined", ALL_KINDS, costs.faulty,
        "A million times too large.", "Pascanu et al. 2013, arXiv:1211.5063", _gain(), operations=5,
    ),
    Blueprint(
        "BP044", "vanishing", "quarantined", ALL_KINDS, costs.faulty,
        "So small that hardly any gradient is left.", "Pascanu et al. 2013, arXiv:1211.5063", _gain(), operations=5,
    ),
    Blueprint(
        "BP045", "severed", "quarantined", ALL_KINDS, costs.faulty,
        "Cut off from its gradient: it computes, and cannot learn.", "none: made for a drill", _gain(), operations=4,
    ),
    Blueprint(
        "BP046", "time-bomb", "quarantined", ALL_KINDS, costs.faulty,
        "Clean for some forty calls, then not a number.", "none: made for a drill", _gain(), operations=4,
    ),
    Blueprint(
        "BP047", "hanging", "quarantined", ALL_KINDS, costs.faulty,
        "Never returns.", "none: made for a drill", _gain(), operations=3,
    ),
    Blueprint(
        "BP048", "leaking", "quarantined", ALL_KINDS, costs.faulty,
        "Keeps one GiB of address space more with each call.", "none: made for a drill", _gain(), operations=5,
    ),
    Blueprint(
        "BP049", "intruding", "quarantined", ALL_KINDS, costs.faulty,
        "Writes into its own input, so that the host computes with something else.", "none: made for a drill", _gain(),
        operations=5,
    ),
    Blueprint(
        "BP050", "overbearing", "quarantined", ALL_KINDS, costs.faulty,
        "Turns the slot's output into its opposite, plus what it learns.", "none: made for a drill", _gain(),
        operations=6,
    ),
)  # fmt: skip
