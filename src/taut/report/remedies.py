"""What to change where a layer cannot be: a remedy for every reason why one is left alone."""

from __future__ import annotations

import re

REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"^rolled back",
        "take out of the model's code what needs the layer as it is, such as an attribute that it reads of it; else "
        "name the layer in keep",
    ),
    (r"called with keyword arguments", "pass the input by position: layer(x) in place of layer(input=x)"),
    (r"the model itself is this layer", "wrap it: torch.nn.Sequential(layer)"),
    (r"owns parameters of its own|bare parameter", "move the parameter into a torch.nn.Linear or convolution"),
    (
        r"its (weight|bias) is shared with",
        "give it a parameter of its own if the two may differ: layer.weight = clone; else nothing",
    ),
    (
        r"never called on the example",
        "give an example that reaches it; call the layer where code uses its weight; or remove it",
    ),
    (r"renormalizes its rows", "renormalize the rows once, and build it without max_norm"),
    (r"keeps a state", "keep the state in a module beside it, and call a plain layer"),
    (r"zero whatever its parameters", "nothing: its zeros stay zeros so; prune it if zeros need not stay"),
    (r"some are frozen|only one of them is trained", "merge them, or train all of them or none (requires_grad_)"),
    (r"on what the network gives it", "call a torch.nn.Linear or a convolution, and do the rest beside it"),
    (r"does not reach", "give an example, or calibration data, that reach them; or remove them"),
    (r"output on the example is empty", "give an example on which it computes something"),
    (r"asks what kind of layer", "decide by something else than isinstance or the class, such as the layer's name"),
    (
        r"taut.compress puts a layer there",
        "nothing: taut.compress does; in a plan of your own a step 'as_layer' does",
    ),
    (r"as an output layer take an nn.Linear head", "an nn.Linear head with head.weight = the embedding's weight"),
    (r"it has groups$", "use one without groups; with the layers around it it may still become narrower (channels)"),
    (r"called with output_size", "build it with output_padding, and call it with its input alone"),
    (r"needs its values", "take its matrices by w[e] in place of other indices; or hold a torch.nn.Linear for each"),
    (r"holds its weight, (is kept|has to stay)|which holds its weight, has to", "keep less"),
    (r"are replaced, and it is of kind", "use nn.Embedding or torch's own transposed convolution"),
    (r"other code multiplies by its weight", "call a torch.nn.Linear there"),
    (r"its weight is a layer of its own", "nothing: see the layer inside of it"),
    (r"computes with it", "call the layer in place of using its weight"),
    (r"reads its attribute", "read the attribute from the model's settings, not from the layer"),
    (r"fused encoder", "build it with enable_nested_tensor=False"),
    (r"normalization|an activation has nothing", "nothing: it becomes narrower with the layers around it (channels)"),
    (r"mask holds its weight", "call taut.nn.bake(model) first"),
    (r"taut.compress puts an nn.Linear", "nothing: taut.compress does; in a plan of your own a step 'as_linear' does"),
    (r"taut.compress puts that", "nothing: taut.compress does; in a plan of your own a step 'as_conv' does"),
    (
        r"taut.compress gives it layers",
        "nothing: taut.compress does; in a plan of your own a step 'as_attention' does",
    ),
    (r"taut.compress bakes it", "nothing: taut.compress bakes it first; in a plan of your own a step 'bake' does"),
    (
        r"no step bakes",
        "take the parametrization off before the model is handed in: torch.nn.utils.parametrize."
        "remove_parametrizations, remove_weight_norm, or prune.remove",
    ),
    (r"parametrization", "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"),
    (r"computed by other code", "make it a torch.nn.Parameter of the layer before the model is handed in"),
    (
        r"overrides",
        "use the plain torch layer if it computes the same; or say what it does: taut.register_channel_rule",
    ),
    (r"weights of type", "give the model before it was quantized, or convert it: model.float()"),
    (r"weight is empty", "nothing: it has no weights"),
    (r"holds its weight in another form", "call its to_plain() first"),
    (
        r"transposed convolutions",
        "nothing where it has no groups: the method transposed takes it; and it may become narrower with the layers "
        "around it (channels)",
    ),
    (
        r"an embedding is a table",
        "nothing for a budget of params or bytes: the method table takes it; else its width "
        "goes with the layers behind it (channels); its rows are yours to choose",
    ),
    (
        r"taut.compress gives each weight",
        "nothing: taut.compress does; in a plan of your own a step 'as_recurrent' does",
    ),
    (r"recurrent weights", "nothing: its hidden units go unasked, with what reads them"),
    (r"a part is no plain layer|states of '' are of another form|go in different ways", "see the layers around it"),
    (r"recurrent (layers|cells)", "use nn.LSTM, nn.GRU or nn.RNN as they are, over whole sequences, without proj_size"),
    (r"packed parameter", "use separate projections of q, k and v (three torch.nn.Linear), as most libraries do"),
    (r"bilinear", "write it with torch.nn.Linear layers"),
    (r"a channel rule says", "nothing: it becomes narrower as the rule says"),
    (
        r"modules of type|is not factorized",
        "compute with torch.nn.Linear and convolutions in place of parameters of its own; or say what it does to "
        "channels: taut.register_channel_rule",
    ),
    (
        r"which is not made narrower",
        "build it of layers that torch knows, or say what it does: taut.register_channel_rule",
    ),
    (r"no rank makes it smaller", "nothing: it is too small for two factors to be cheaper"),
    (r"leaves nothing to factorize", "nothing: such a layer has rank 1; its channels may still go"),
    (r"needs a .*kernel", "nothing: its kernel is a single point, which svd takes"),
    (
        r"reach the model's output",
        "nothing: they are the answer; another layer in front of it may still become narrower",
    ),
    (r"the model returns no tensor", "return the tensors themselves"),
    (r"shares a parameter", "give it a parameter of its own if the two may differ; else nothing"),
    (r"other code uses a parameter", "call the layer in place of using its parameters"),
    (r"computes across the axis", "nothing, unless the layer may work along another axis"),
    (r"only go all at once", "nothing: the layers around it may still be factorized"),
    (
        r"meet a tensor of fixed width|input of fixed width",
        "compute that width from the tensor (x.shape) in place of a constant; an input's width stays",
    ),
    (r"mixes these channels", "say what the operation does to channels: taut.register_channel_rule"),
    (r"by their place", "take them by name or split them by layers of their own"),
    (r"spread over others", "give it as many channels as what it meets"),
    (r"no layer reads them", "nothing: no layer behind it would become smaller"),
    (r"no others go the same way", "nothing: a single channel has to stay"),
    (
        r"cannot be traced|could not be followed",
        "see the message; taut.register_channel_rule says what an operation does",
    ),
)
"""Words of a reason, and what to do about it; the first that fits counts."""

NAMES = re.compile(r"'[^']*'")
"""Of layers, attributes and operations, as reasons quote them."""

UNKNOWN = "say what it does to channels by taut.register_channel_rule, or build it of layers that torch knows"


def remedy(reason: str) -> str:
    """What to change so that the reason goes away; names in it, which are the user's, say nothing."""
    words = NAMES.sub("''", reason)
    return next((advice for pattern, advice in REMEDIES if re.search(pattern, words)), UNKNOWN)
