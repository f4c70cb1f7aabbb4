"""Softmax attention: softmax(q k^T / sqrt(d)) v, bidirectional (MAR, VAE) or causal (LLM).

With more keys than queries the causal mask is aligned to the last key: query i sees keys 0 .. Lk - Lq + i.
Grouped queries: query head h reads key head h // (heads / kv_heads).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def attention_ref(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """q (B, H, Lq, d); k, v (B, K, Lk, d); all in float32, scores materialised."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.float(), k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, Lq, Lk)
    if causal:
        lq, lk = scores.shape[-2:]
        seen = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq)
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """q (B, H, Lq, d); k, v (B, K, Lk, d), one dtype; returns (B, H, Lq, d)."""
    grouped = q.shape[1] != k.shape[1]
    if causal and q.shape[2] > 1:
        bias = None if q.shape[2] == k.shape[2] else causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
