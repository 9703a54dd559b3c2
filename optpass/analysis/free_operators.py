"""Which operators sum no products, so that a cost of nothing is right for them.

Everything that is not known here, to the schema or to a rule in :mod:`optpass.analysis.mac_rules`, may
multiply matrices: a new operator of PyTorch, one of a package of one's own. Costs name it instead of
passing it over.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from optpass.analysis.operators import is_view

ARITHMETIC = """
    add sub mul div rsub pow maximum minimum fmod remainder floor_divide true_divide where clamp to _to_copy
    prelu _prelu_kernel glu logit cumsum cumprod cummax cummin logcumsumexp diff cross linalg_cross complex real
    polar view_as_complex view_as_real angle isclose isfinite isin bucketize searchsorted masked_fill
    masked_scatter copy type_as item _local_scalar_dense addr outer
    _add_relu absolute subtract multiply divide lerp threshold celu selu relu6 hardtanh log_sigmoid
    __and__ __or__ __xor__ __lshift__ __rshift__ ceil floor round trunc
    fake_quantize_per_tensor_affine fake_quantize_per_channel_affine quantize_per_tensor quantize_per_channel dequantize
"""
NORMALISATIONS = """
    batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training native_batch_norm group_norm
    native_group_norm layer_norm native_layer_norm instance_norm rms_norm _fused_rms_norm _weight_norm
    _weight_norm_interface norm_except_dim softmax _softmax _safe_softmax log_softmax _log_softmax _masked_softmax
"""
REDUCTIONS = """
    sum mean prod max min amax amin aminmax argmax argmin all any var std var_mean std_mean norm linalg_vector_norm
    linalg_norm frobenius_norm logsumexp nansum nanmean median nanmedian mode count_nonzero topk sort argsort msort
    kthvalue unique_consecutive _unique2 unique_dim nonzero nonzero_static bincount histc equal allclose
    cosine_similarity pairwise_distance trace
"""
SAMPLING = """
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    fractional_max_pool2d max_unpool2d max_unpool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_lanczos2d_aa grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator
"""
MOVES = """
    cat concat concatenate stack hstack vstack dstack column_stack row_stack chunk split split_with_sizes unsafe_chunk
    unsafe_split unsafe_split_with_sizes pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d _pad_circular _pad_enum repeat repeat_interleave tile roll
    flip fliplr flipud rot90 gather scatter scatter_add scatter_reduce index index_select index_put index_add index_copy
    index_fill _unsafe_index _unsafe_index_put _unsafe_masked_index select_scatter slice_scatter diagonal_scatter
    as_strided_scatter take take_along_dim masked_select embedding embedding_bag one_hot tril triu
    diag diag_embed diagflat block_diag broadcast_tensors meshgrid cartesian_prod pixel_shuffle pixel_unshuffle
    channel_shuffle native_channel_shuffle im2col col2im unfold _unsafe_view clone reshape contiguous lift_fresh_copy
    to_padded_tensor resize
"""
CREATION = """
    arange linspace logspace zeros ones full empty eye scalar_tensor tril_indices triu_indices zeros_like ones_like
    full_like empty_like rand_like randn_like randint_like rand randn randint randperm new_zeros new_ones new_full
    new_empty new_empty_strided empty_strided normal bernoulli multinomial dropout native_dropout
    _shape_as_tensor fill zero
"""
SIZES = "sym_size sym_stride sym_numel sym_storage_offset size numel dim"
FREE = frozenset(" ".join((ARITHMETIC, NORMALISATIONS, REDUCTIONS, SAMPLING, MOVES, CREATION, SIZES)).split())
"""ATen names, every overload of them."""


def is_free(node: Node) -> bool:
    """Whether ``node`` is known to sum no products: by its tags, its schema or its name."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        # getitem, and arithmetic on sizes.
        return True
    if torch.Tag.pointwise in target.tags or is_view(node):
        return True
    return target.namespace == "aten" and target._opname in FREE
