"""An expert as a whole: wi, the activation, wo, the router's probability."""

from pallas_kernels.mlp.op import packed_mlp as packed_mlp
