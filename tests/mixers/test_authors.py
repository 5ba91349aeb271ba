"""Mixers against numbers that their authors' own code gave for the same weights: of an image of one row of pixels.

Layers that see the whole image were run on every prefix of the row and read at its last token, without what has two
dimensions (LePE, rotations). Found with qhfan/MALA, ZacharyMeng/NaLaFormer (1f1c10a) and OpenNLPLab/fairseq-evo (T2).
"""

import pytest
import torch

from seqtrain.mixers import MIXERS, LayerShape

pytestmark = pytest.mark.usefixtures("no_gradients")

WIDTH, HEADS, TOKENS = 8, 2, 6
# Tokens 0, 2 and 5, channels 0 to 3.
MALA = [
    [0.028736856, 0.001611247, -0.027087893, -0.029333213],
    [-0.026564588, 0.017711208, 0.044690379, 0.028025283],
    [0.010481294, 0.012061049, 0.00186208, -0.010155381],
]
NALAFORMER = [
    [0.106723961, 0.008941528, -0.09757313, -0.108798649],
    [-0.137088816, 0.031538829, 0.169365905, 0.141791591],
    [-0.0700532, 0.101756903, 0.174192028, 0.076512609],
]
TRANS_NORMER = [
    [1.10290746, 0.591483794, -0.497578221, -1.100709319],
    [0.688069753, 0.356712791, -0.323007035, -0.687280769],
    [-0.186018237, -0.747669209, -0.579152401, 0.154960017],
]


def matrix(number):
    places = torch.arange(WIDTH * WIDTH, dtype=torch.float64).view(WIDTH, WIDTH)
    return 0.6 * torch.cos(number + 1.7 * places)


def output(name, index=0, paired=False, **fields):
    cls = MIXERS.get(name)
    mixer = cls(cls.Config(**fields), LayerShape(WIDTH, HEADS, index, 4)).double()
    q, k, v = map(matrix, (1, 2, 3))
    if paired:
        # Neighbouring channels are rotated together there, and the other way round; here those half a head apart.
        q, k = (part.view(HEADS, 2, 2, WIDTH).transpose(1, 2).flip(1).reshape(WIDTH, WIDTH) for part in (q, k))
    mixer.qkv.linear.weight.copy_(torch.cat([q, k, v]))
    mixer.out.weight.copy_(matrix(5))
    if hasattr(mixer, "gate"):
        mixer.gate.weight.copy_(matrix(4))
    x = torch.sin(0.9 * torch.arange(TOKENS * WIDTH, dtype=torch.float64)).view(1, TOKENS, WIDTH)
    return mixer(x)[0][0, [0, 2, 5], :4]


# Numbers of about 0.1. They add 1e-6 to sums of weights, here squares of lengths have 1e-6 added.
CLOSE = {"rtol": 0, "atol": 1e-4}


def test_mala():
    torch.testing.assert_close(output("mala", conv_width=0), torch.tensor(MALA).double(), **CLOSE)


def test_nalaformer():
    torch.testing.assert_close(output("nalaformer", conv_width=0), torch.tensor(NALAFORMER).double(), **CLOSE)
    each = output("nalaformer", conv_width=0, norm_over="head")
    assert (each - torch.tensor(NALAFORMER)).abs().max() > 0.01


def test_trans_normer():
    came = output("trans_normer", index=3, paired=True)
    torch.testing.assert_close(came, torch.tensor(TRANS_NORMER).double(), **CLOSE)
    each = output("trans_normer", index=3, paired=True, norm_over="head")
    assert (each - torch.tensor(TRANS_NORMER)).abs().max() > 0.01
