"""The Pallas kernels of the product, one for each route of `pallas_kernels.matmul.routes`."""
