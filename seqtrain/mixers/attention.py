"""Full causal softmax attention (Vaswani et al. 2017, arXiv 1706.03762), with grouped queries and rotary positions."""

from seqtrain.mixers.common.attention import SoftmaxAttention


class Attention(SoftmaxAttention):
    """Every token sees all before it in its document; the state is their keys and values, and grows."""
