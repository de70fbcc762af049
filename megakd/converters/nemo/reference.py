"""What a `.nemo` computes, in plain PyTorch from its raw tensors: the other side of the parity gate.

It reads the config's own words and every tensor parallel rank's own piece, and adds the ranks up as NeMo did, so that
it shares neither the merging of pieces nor the model section with the conversion that it judges.

Legend: P prompts, S sequence, H hidden, N heads of a rank, G query groups of a rank, D channels of a head.
"""

import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd.config import Model
from megakd.converters.huggingface.reference import Reference
from megakd.converters.nemo.archive import read_config
from megakd.converters.nemo.weights import NemoWeights
from megakd.progress import progress_bar


class NemoReference:
    """A GPT of an unpacked archive; one layer's weights are in memory at a time.

    Args:
        model: only tells how tensors of distributed layouts are stacked.
    """

    def __init__(self, folder: pathlib.Path, model: Model):
        self.config, self.model = read_config(folder, folder), model
        self.weights = NemoWeights(folder, self.config)
        self.heads = self.config["num_attention_heads"]
        self.channels = self.config.get("kv_channels") or self.config["hidden_size"] // self.heads
        self.groups = self.config.get("num_query_groups") or self.heads
        self.fused = self.config.get("bias_activation_fusion", self.config.get("bias_gelu_fusion", True))

    @torch.no_grad()
    def run(self, ids_PS: Tensor, *, progress: bool = False) -> Reference:
        hidden_PSH = F.embedding(ids_PS, torch.cat(self._pieces("embedding.word_embeddings.weight")))
        if self.config.get("position_embedding_type", "learned_absolute") == "learned_absolute":
            hidden_PSH = hidden_PSH + self._pieces("embedding.position_embeddings.weight")[0][: ids_PS.shape[1]]
        layers = []
        with progress_bar(self.config["num_layers"], "verifying: nemo", shown=progress) as bar:
            for i in range(self.config["num_layers"]):
                layers.append((hidden_PSH, self._layer(f"decoder.layers.{i}.", hidden_PSH)))
                hidden_PSH = layers[-1][1]
                bar.update()
        hidden_PSH = self._norm("decoder.final_layernorm.", hidden_PSH)
        tied = self.config.get("share_embeddings_and_output_weights", True)
        head = torch.cat(self._pieces("embedding.word_embeddings.weight" if tied else "output_layer.weight"))
        return Reference(F.linear(hidden_PSH, head)[..., : self.model.vocab_size], layers)

    def _pieces(self, name: str) -> list[Tensor]:
        return [piece.float() for piece in self.weights.pieces(name, self.model)]

    def _biases(self, name: str, ranks: int) -> list[Tensor | None]:
        return self._pieces(name) if name in self.weights.names(self.model) else [None] * ranks

    def _layer(self, prefix: str, hidden_PSH: Tensor) -> Tensor:
        attention, block = f"{prefix}self_attention.", f"{prefix}mlp."
        x_PSH = self._norm(f"{attention}linear_qkv.layer_norm_", hidden_PSH)
        qkv = self._pieces(f"{attention}linear_qkv.weight")
        biases = self._biases(f"{attention}linear_qkv.bias", len(qkv))
        heads = [self._attend(F.linear(x_PSH, w, b), attention, len(qkv)) for w, b in zip(qkv, biases, strict=True)]
        hidden_PSH = hidden_PSH + self._add_up(f"{attention}linear_proj", heads)
        x_PSH = self._norm(f"{block}linear_fc1.layer_norm_", hidden_PSH)
        return hidden_PSH + self._add_up(f"{block}linear_fc2", self._inner(block, x_PSH))

    def _add_up(self, name: str, inputs: list[Tensor]) -> Tensor:
        weights = self._pieces(f"{name}.weight")
        total = sum(F.linear(x, w) for x, w in zip(inputs, weights, strict=True))
        bias = self._biases(f"{name}.bias", 1)[0]
        return total if bias is None else total + bias

    def _norm(self, prefix: str, x: Tensor) -> Tensor:
        kind, eps = self.config.get("normalization", "layernorm1p"), float(self.config.get("layernorm_epsilon", 1e-5))
        weight = self._pieces(f"{prefix}weight")[0]
        if kind == "rmsnorm":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        bias = self._pieces(f"{prefix}bias")[0]
        return F.layer_norm(x, x.shape[-1:], weight + 1 if kind == "layernorm1p" else weight, bias, eps)

    def _attend(self, qkv_PSX: Tensor, prefix: str, ranks: int) -> Tensor:
        """One rank's heads: [P, S, rows of its piece] -> [P, S, N * D]."""
        groups, channels = self.groups // ranks, self.channels
        if self.weights.queries_first:
            q, k, v = qkv_PSX.unflatten(2, (3, groups, channels)).unbind(2)
        else:
            per_group = self.heads // self.groups
            q, k, v = qkv_PSX.unflatten(2, (groups, -1, channels)).split([per_group, 1, 1], 3)
            q, k, v = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
        if self.config.get("qk_layernorm"):
            q = self._norm(f"{prefix}q_layernorm.", q)
            k = self._norm(f"{prefix}k_layernorm.", k)
        if self.config.get("position_embedding_type") == "rope":
            q, k = self._rotate(q), self._rotate(k)
        k, v = (x.repeat_interleave(q.shape[2] // groups, 2) for x in (k, v))
        scores = torch.einsum("pqnd,pknd->pnqk", q, k) / channels**0.5
        age = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        window = self.config.get("window_size")
        hidden = (age < 0) | (age > (window[0] if window else q.shape[1]))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(3)
        return torch.einsum("pnqk,pknd->pqnd", weights, v).flatten(2)

    def _rotate(self, x_PSND: Tensor) -> Tensor:
        rotated = int(self.channels * self.config.get("rotary_percentage", 1.0))
        turn = 1.0 / (self.config.get("rotary_base", 10000) ** (torch.arange(0, rotated, 2).float() / rotated))
        if self.config.get("scale_positional_embedding"):
            wavelength = 2 * torch.pi / turn
            blend = ((8192 / wavelength - 1) / 3).clamp(0, 1)
            turn = turn / 8 * (1 - blend) + turn * blend
        position = torch.arange(x_PSND.shape[1]).float() / (self.config.get("seq_len_interpolation_factor") or 1)
        angle = torch.outer(position, turn)[None, :, None, :]
        first, second, rest = x_PSND.split([rotated // 2, rotated // 2, self.channels - rotated], 3)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], 3)

    def _inner(self, prefix: str, x_PSH: Tensor) -> list[Tensor]:
        """The activated inner channels of each rank."""
        weights = self._pieces(f"{prefix}linear_fc1.weight")
        biases = self._biases(f"{prefix}linear_fc1.bias", len(weights))
        outputs = [F.linear(x_PSH, w, b) for w, b in zip(weights, biases, strict=True)]
        name = self.config.get("activation", "gelu")
        act = self._activation(name)
        if "glu" not in name:
            return [act(x) for x in outputs]
        ups = f"{prefix}linear_fc1.up_weight"
        if ups in self.weights.ranks:
            up_biases = self._up_biases(f"{prefix}linear_fc1.up_bias", len(weights))
            pieces = zip(outputs, self._pieces(ups), up_biases, strict=True)
            return [act(gate) * F.linear(x_PSH, w, b) for gate, w, b in pieces]
        return [act(gate) * up for gate, up in (x.chunk(2, -1) for x in outputs)]

    def _up_biases(self, name: str, ranks: int) -> list[Tensor | None]:
        return self._pieces(name) if name in self.weights.ranks else [None] * ranks

    def _activation(self, name: str):
        if "swiglu" in name:
            return F.silu
        if "reglu" in name or name == "relu":
            return F.relu
        if name == "squared-relu":
            return lambda x: F.relu(x).square()
        tanh = name == "approx-gelu" or self.fused or self.config.get("openai_gelu")
        return lambda x: F.gelu(x, approximate="tanh" if tanh else "none")
