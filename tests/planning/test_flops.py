import jax
import jax.numpy as jnp

from lumos_jax.planning import flops


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_matmuls_within_loops_and_checkpoints():
    def layers(x, kernels):
        return jax.lax.scan(jax.checkpoint(lambda x, k: (jnp.tanh(x @ k), None)), x, kernels)[0]

    assert flops.count(layers, shape(8, 16), shape(5, 16, 16)) == 5 * 2 * 8 * 16 * 16


def test_convolutions():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    # 4 x 4 places, each 3 x 3 x 6 products for each of 10 channels.
    assert flops.count(convolve, shape(2, 8, 8, 6), shape(3, 3, 6, 10)) == 2 * 2 * 16 * 10 * 54


def test_of_branches_the_largest_counts_and_batched_matmuls_count_each():
    def either(x, y):
        return jax.lax.cond(x.sum() > 0, lambda: jnp.einsum("bij,bjk->bik", x, y), lambda: jnp.zeros((3, 4, 6)))

    assert flops.count(either, shape(3, 4, 5), shape(3, 5, 6)) == 3 * 2 * 4 * 5 * 6
