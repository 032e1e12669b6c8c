from typing import Any

from optkit.passes.fuse_conv_bn import FuseConvBn

NORM = "<float[2] k = {2, 4}, float[2] t = {1, 3}, float[2] mean = {0.5, 1}, float[2] var = {1, 4}"
BN = "BatchNormalization<epsilon = 0.0>(c, k, t, mean, var)"


def test_batch_norm_goes_into_the_convolution(rewrites: Any) -> None:
    before = f"""g (float[n,1,4,4] x) => (float[n,2,4,4] y) {NORM}, float[2,1,1,1] w = {{1, 2}}> {{
        c = Conv(x, w) y = {BN} }}"""
    after = """g (float[n,1,4,4] x) => (float[n,2,4,4] y) <float[2,1,1,1] w = {2, 4}, float[2] b = {0, 1}> {
        y = Conv(x, w, b) }"""
    rewrites(FuseConvBn(), before, after)


def test_batch_norm_goes_into_a_gemm(rewrites: Any) -> None:
    before = f"""g (float[n,1] x) => (float[n,2] y) {NORM}, float[1,2] w = {{1, 2}}, float[2] b = {{1, 1}}> {{
        c = Gemm(x, w, b) y = {BN} }}"""
    after = """g (float[n,1] x) => (float[n,2] y) <float[1,2] w = {2, 4}, float[2] b = {2, 3}> {
        y = Gemm(x, w, b) }"""
    rewrites(FuseConvBn(), before, after)


def test_stays_where_the_convolution_is_needed_elsewhere_or_its_weight_is_shared(leaves: Any) -> None:
    weight = ", float[2,1,1,1] w = {1, 2}>"
    leaves(
        FuseConvBn(),
        f"g (float[n,1,4,4] x) => (float[n,2,4,4] y, float[n,2,4,4] c) {NORM}{weight} {{ c = Conv(x, w) y = {BN} }}",
    )
    leaves(
        FuseConvBn(),
        f"g (float[n,1,4,4] x) => (float[n,2,4,4] y, float[n,2,4,4] z) {NORM}{weight} {{"
        f" c = Conv(x, w) y = {BN} z = Conv(x, w) }}",
    )
