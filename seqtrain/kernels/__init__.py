"""The operators: pure functions of tensors, each with a definition and faster forms of it.

Each is an `Operator`; a recurrent one takes `initial_state` and `cu_seqlens` and returns `(out, final_state)`.
`OPERATORS` has all of them by name. The bits of a document's outputs, states and gradients do not depend on the numbers
of other documents in its row; on their lengths they may, since products of other sizes add up in another order.
"""

from seqtrain.kernels.delay import delay as delay
from seqtrain.kernels.delta_rule import delta_rule as delta_rule
from seqtrain.kernels.diagonal_scan import diagonal_scan as diagonal_scan
from seqtrain.kernels.diagonal_system import diagonal_system as diagonal_system
from seqtrain.kernels.gated_norm import gated_norm as gated_norm
from seqtrain.kernels.kronecker_attention import kronecker_attention as kronecker_attention
from seqtrain.kernels.linear_attention import linear_attention as linear_attention
from seqtrain.kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from seqtrain.kernels.linear_swiglu import linear_swiglu as linear_swiglu
from seqtrain.kernels.operator import Operator as Operator
from seqtrain.kernels.operator import operator as operator
from seqtrain.kernels.short_convolution import short_convolution as short_convolution
from seqtrain.kernels.sink_attention import sink_attention as sink_attention
from seqtrain.kernels.slot_scores import slot_scores as slot_scores
from seqtrain.kernels.softmax_attention import softmax_attention as softmax_attention
from seqtrain.kernels.sparse_mlp import sparse_mlp as sparse_mlp
from seqtrain.kernels.swiglu import swiglu as swiglu
from seqtrain.kernels.tensor_attention import feature_count as feature_count
from seqtrain.kernels.tensor_attention import tensor_attention as tensor_attention
from seqtrain.kernels.ttt_linear import ttt_linear as ttt_linear

OPERATORS = {name: found for name, found in list(globals().items()) if isinstance(found, Operator)}
