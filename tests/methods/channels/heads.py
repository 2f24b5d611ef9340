"""Attention as libraries write it: how many heads there are is a whole number that the module holds."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that every torch user knows

WIDTH, HEADS, WIDE = 24, 4, 6


class Attention(nn.Module):
    """What all of them hold; `depth` has the value of the heads, and `embed_dim` of their widths, and mean others."""

    def __init__(self, heads=HEADS, wide=WIDE, inputs=WIDTH):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, wide, heads * wide
        self.depth, self.embed_dim = heads, heads * wide
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(inputs, heads * wide))
        self.proj = nn.Linear(heads * wide, inputs)

    def projected(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Timm(Attention):
    def __init__(self, heads=3, wide=8):
        super().__init__(heads, wide)
        del self.q_proj, self.k_proj, self.v_proj
        self.qkv = nn.Linear(WIDTH, 3 * self.attn_dim)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(y.transpose(1, 2).reshape(b, n, self.attn_dim))


class HeadsFirst(Timm):
    """As many heads as there are projections, and the literal stands behind them."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, self.num_heads, 3, self.head_dim).unbind(3)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.proj(y.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class Whisper(Attention):
    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.projected(x)
        q = q.view(b, n, -1, self.head_dim).transpose(1, 2).contiguous()
        k, v = (t.view(b, -1, self.num_heads, self.head_dim).transpose(1, 2) for t in (k, v))
        weights = (q @ k.transpose(2, 3) * self.head_dim**-0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))


class Opt(Attention):
    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, -1, self.num_heads, self.head_dim).transpose(1, 2) for t in self.projected(x))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Unnamed(Attention):
    """No name says what counts the heads."""

    def __init__(self):
        super().__init__()
        self.n, self.d = self.num_heads, self.head_dim
        del self.num_heads, self.head_dim

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, -1, self.n, self.d).transpose(1, 2) for t in self.projected(x))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Flattened(Attention):
    """Heads and samples on one axis, and the widths of all heads as the input has them: as code was written before."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (
            t.view(b, n, self.num_heads, self.head_dim).transpose(1, 2).reshape(b * self.num_heads, n, self.head_dim)
            for t in self.projected(x)
        )
        weights = torch.bmm(q, k.transpose(1, 2)).mul(self.head_dim**-0.5).softmax(-1)
        y = torch.bmm(weights, v).view(b, self.num_heads, n, self.head_dim).transpose(1, 2)
        return self.proj(y.reshape(b, n, self.embed_dim))


class Parts(Attention):
    """Queries, keys and values by one layer, in parts of a width that is held."""

    def __init__(self):
        super().__init__()
        del self.q_proj, self.k_proj, self.v_proj
        self.split_size = self.attn_dim
        self.qkv = nn.Linear(WIDTH, 3 * self.split_size)

    def forward(self, x):
        parts = self.qkv(x).split(self.split_size, dim=2)
        q, k, v = (t.view(*t.shape[:2], -1, self.head_dim).transpose(1, 2) for t in parts)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Grouped(Attention):
    """Two queries share a key."""

    def __init__(self):
        super().__init__()
        self.num_kv_heads = self.num_heads // 2
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, self.num_kv_heads * self.head_dim) for _ in range(2))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.projected(x)
        q = q.view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (t.view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2) for t in (k, v))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(b, -1, n, self.head_dim) for t in (k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Literal(Attention):
    """The code says the numbers itself."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, WIDE).transpose(1, 2) for t in self.projected(x))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, HEADS * WIDE))


class OfInputs(Opt):
    """The widths of all heads are those of the input."""

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (t.view(b, n, self.num_heads, c // self.num_heads).transpose(1, 2) for t in self.projected(x))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Scaled(Opt):
    """What counts the heads is a factor, too."""

    def forward(self, x):
        return super().forward(x) * self.num_heads


class Used(Opt):
    """What equals the heads, and their widths, is used, and means something else."""

    def forward(self, x):
        return super().forward(x) / self.depth + self.embed_dim


class Narrowing(Attention):
    """Any width of heads will do: their width falls, as it always could."""

    def forward(self, x):
        b, n, _ = x.shape
        parts = self.projected(x)
        q, k, v = (t.view(b, n, self.num_heads, t.shape[-1] // self.num_heads).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)
        return self.proj(y.flatten(2))


class Net(nn.Module):
    """Two blocks of attention and a dense layer, and scores."""

    def __init__(self, kind, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, WIDTH)
        self.attn = nn.ModuleList(kind() for _ in range(blocks))
        self.fc1, self.fc2, self.head = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = self.embed(x)
        for attention in self.attn:
            x = x + attention(x)
        return self.head((x + self.fc2(self.fc1(x).relu())).mean(1))


def net(kind):
    return Net(kind).eval()


def draw(size=2, seed=1):
    return torch.randn(size, 8, 5, generator=torch.Generator().manual_seed(seed))


def batches():
    return [draw(48, seed=place) for place in range(2)]
