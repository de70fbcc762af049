"""The other side of the tests: transformers' own models, hooked for importances, and with parts zeroed."""

import collections

import torch
import torch.nn.functional as F

PROJECTIONS = {"o_proj": "down_proj", "c_proj": "c_proj"}  # what ends attention -> what ends the feed-forward block


def load(path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def set_layers(model, layers):
    owner, name = (model.transformer, "h") if hasattr(model, "transformer") else (model.model, "layers")
    setattr(owner, name, torch.nn.ModuleList(layers))
    model.config.num_hidden_layers = len(layers)


def norms_of(model):
    """Those of hidden channels: two of each layer, and the last."""
    found = [norm for layer in layers_of(model) for name, norm in layer.named_children() if is_norm(name)]
    return [*found, model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm]


def is_norm(name):
    return name.startswith("ln_") or name.endswith("layernorm")


def attention_end(layer):
    return layer.attn.c_proj if hasattr(layer, "attn") else layer.self_attn.o_proj


def block_end(block):
    return block.c_proj if hasattr(block, "c_proj") else block.down_proj


def has_experts(layer):
    return hasattr(layer.mlp, "experts")


class Sums:
    def __init__(self):
        self.squares, self.samples = 0.0, 0
        self.sums, self.tokens = 0.0, 0

    def sample(self, magnitudes_TC):
        """What one sample's tokens give."""
        self.squares, self.samples = self.squares + magnitudes_TC.double().mean(0) ** 2, self.samples + 1

    def token(self, magnitudes_TC):
        self.sums, self.tokens = self.sums + magnitudes_TC.double().sum(0), self.tokens + len(magnitudes_TC)

    def importance(self):
        return self.sums / self.tokens if self.tokens else (self.squares / self.samples) ** 0.5


@torch.no_grad()
def importances(path, section, samples):
    """By key and place, of samples of any lengths, each run alone."""
    model, found = load(path), collections.defaultdict(Sums)
    for number, norm in enumerate(norms_of(model)):
        norm.register_forward_hook(lambda _, i, out, n=number: found["hidden_size", n].sample(out[0].abs()))
    for number, layer in enumerate(layers_of(model)):
        watch(found, number, layer, section)
    for ids in samples:
        model(torch.as_tensor(ids)[None], use_cache=False)
    result = collections.defaultdict(dict)
    for (key, *place), sums in found.items():
        result[key][tuple(place)] = sums.importance()
    result["hidden_size"] = {(): torch.stack(list(result["hidden_size"].values())).mean(0)}
    groups = section.num_query_groups or section.num_attention_heads
    result["num_query_groups"] = {k: v.view(groups, -1).mean(1) for k, v in result["num_query_groups"].items()}
    return result


def watch(found, number, layer, section):
    def influence(_, args, kwargs, output):
        before_TH, after_TH = (
            (args[0] if args else kwargs["hidden_states"])[0],
            output if output.dim() == 2 else output[0],
        )
        cosine_T = (before_TH * after_TH).sum(1) / (before_TH.norm(dim=1) * after_TH.norm(dim=1))
        found["num_layers", number].token(1 - cosine_T)

    def heads(_, inputs):
        heads_TND = inputs[0][0].unflatten(-1, (section.num_attention_heads, -1))
        found["num_query_groups", number].sample(heads_TND.square().sum(-1).sqrt())

    def inner(key):
        return lambda _, inputs: found[key, number].sample(inputs[0].reshape(-1, inputs[0].shape[-1]).abs())

    layer.register_forward_hook(influence, with_kwargs=True)
    attention_end(layer).register_forward_pre_hook(heads)
    if not has_experts(layer):
        block_end(layer.mlp).register_forward_pre_hook(inner("ffn_hidden_size"))
        return
    if hasattr(layer.mlp, "shared_expert"):
        block_end(layer.mlp.shared_expert).register_forward_pre_hook(inner("shared_ffn_hidden_size"))

    def experts(module, inputs):
        hidden_TH, ids_TK, weights_TK = inputs
        weights_TE = torch.zeros(len(hidden_TH), section.moe.num_experts).scatter(1, ids_TK, weights_TK)
        found["num_experts", number].sample(weights_TE)
        for expert in range(section.moe.num_experts):
            rows = (ids_TK == expert).any(1)
            gate, up = (hidden_TH[rows] @ module.gate_up_proj[expert].T).chunk(2, -1)
            inner_TF = F.silu(gate) * up * weights_TE[rows, expert, None]
            found["expert_ffn_hidden_size", number, expert].token(inner_TF.abs())

    layer.mlp.experts.register_forward_pre_hook(experts)


@torch.no_grad()
def logits_without(path, section, kept, ids_PS):
    """[P, S, V] of the model with what is not kept skipped (layers), masked (experts) or zeroed (channels)."""
    model, layers = load(path), None
    layers = list(layers_of(model))
    for number, layer in enumerate(layers):
        zero_columns(attention_end(layer), removed_heads(section, kept, number))
        if not has_experts(layer):
            zero_columns(block_end(layer.mlp), removed(section.ffn_hidden_size, kept.of("ffn_hidden_size", number)))
            continue
        moe = section.moe
        for expert in range(moe.num_experts):
            inner = removed(moe.ffn_hidden_size, kept.of("expert_ffn_hidden_size", number, expert))
            layer.mlp.experts.down_proj[expert][:, inner] = 0
        if hasattr(layer.mlp, "shared_expert"):
            inner = removed(moe.shared_ffn_hidden_size, kept.of("shared_ffn_hidden_size", number))
            zero_columns(block_end(layer.mlp.shared_expert), inner)
        mask_router(layer.mlp.gate, removed(moe.num_experts, kept.of("num_experts", number)))
    if (hidden := kept.of("hidden_size")) is not None:
        without_channels(model, layers, removed(section.hidden_size, hidden), hidden)
    set_layers(model, [layers[number] for number in kept.layers])
    return model(input_ids=ids_PS, use_cache=False).logits


def removed(size, kept):
    return [] if kept is None else sorted(set(range(size)) - set(kept.tolist()))


def removed_heads(section, kept, number):
    """Channels of the query heads of groups that are not kept."""
    groups = section.num_query_groups or section.num_attention_heads
    width = section.num_attention_heads // groups * section.head_channels
    gone = removed(groups, kept.of("num_query_groups", number))
    return [channel for group in gone for channel in range(group * width, (group + 1) * width)]


def zero_columns(linear, inputs):
    """Of a torch Linear [out, in], or of GPT-2's [in, out]."""
    if isinstance(linear, torch.nn.Linear):
        linear.weight[:, inputs] = 0
    else:
        linear.weight[inputs] = 0


def mask_router(gate, gone):
    def forward(hidden_TH):
        logits_TE = F.linear(hidden_TH.reshape(-1, hidden_TH.shape[-1]), gate.weight)
        logits_TE[:, gone] = -torch.inf
        weights_TK, ids_TK = logits_TE.float().softmax(-1).topk(gate.top_k, dim=-1)
        if gate.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK, ids_TK

    gate.forward = forward


def without_channels(model, layers, gone, kept):
    """Nothing is written to these channels of the residual stream, and every norm is taken over the others."""
    body = model.transformer if hasattr(model, "transformer") else model.model
    for module in body.children():
        if isinstance(module, torch.nn.Embedding):
            module.weight[:, gone] = 0
    for layer in layers:
        ends = [attention_end(layer)]
        ends += [layer.mlp.shared_expert.down_proj] if has_experts(layer) else [block_end(layer.mlp)]
        for linear in ends:
            if isinstance(linear, torch.nn.Linear):
                linear.weight[gone] = 0
            else:
                linear.weight[:, gone] = 0
            if getattr(linear, "bias", None) is not None:
                linear.bias[gone] = 0
        if has_experts(layer):
            layer.mlp.experts.down_proj[:, gone] = 0
    for norm in norms_of(model):
        norm.forward = norm_over(norm, kept)


def norm_over(norm, kept):
    bias = getattr(norm, "bias", None)
    epsilon = norm.variance_epsilon if bias is None else norm.eps

    def forward(hidden_BSH):
        some = hidden_BSH[..., kept]
        if bias is not None:
            some = some - some.mean(-1, keepdim=True)
        some = some * torch.rsqrt(some.square().mean(-1, keepdim=True) + epsilon) * norm.weight[kept]
        out = torch.zeros_like(hidden_BSH)
        out[..., kept] = some if bias is None else some + bias[kept]
        return out

    return forward
