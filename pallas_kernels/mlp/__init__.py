"""A whole expert: wi, the activation, wo and the router probability."""

from pallas_kernels.mlp.op import packed_mlp as packed_mlp
