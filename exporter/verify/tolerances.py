"""The limits of every numeric gate, each with its reason. A test proves for each that it can fail.

What "20 families" says was measured on a tiny model of each: benchmarks/tolerances.md has the values by family.
"""

from __future__ import annotations

from typing import Final

#: Merged checkpoint in transformers against the unmerged adapter in stock PEFT, both fp32, same kernels: what is
#: left is the order of additions. Measured: 0 in 20 families and on SmolLM2; one ulp of a logit of 100 is 7.6e-6.
HF_MAX_ABS: Final = 1e-5
#: Sums of base and update that are stored in 16 bits: fp32 noise tips a few in 100,000 to the other neighbour. Their
#: share of what the whole rounding does to the logits; every stored value is compared by itself as well.
HF_ROUNDING_SHARE: Final = 0.1

#: ONNX Runtime's fp32 kernels against torch's. Measured on SmolLM2, texts of 20 to 40 tokens: up to 1.3e-4, where
#: torch's own fp32 is up to 1.7e-4 from its float64. In 20 families up to 1.3e-5, with cache and padding alike.
ONNX_MAX_ABS: Final = 2e-4

#: ONNX in float16 computes in float16, activations and cache included. Measured on SmolLM2: 1.1e-5; 20 families: 5e-6.
ONNX_HALF_KL: Final = 1e-4

#: A quantised ONNX graph against itself, fed in another way: the kernels for one row and for many sum in another order,
#: which tips some roundings of activations to 8 bits. Measured on SmolLM2, int8 and int4: up to 4.8e-3; queries that
#: are rotated one position too far behind a cache: 0.26 on a tiny model.
ONNX_MODES_KL: Final = 2e-2

#: llama.cpp computes with float32 weights and a float32 cache: only the order of additions differs. Measured in 20
#: families: up to 1.4e-7 in F32, 2.2e-6 in F16 and 1.6e-4 in BF16, where SmolLM2 has 1.5e-4.
GGUF_KL: Final = {
    "F32": 1e-6,
    # llama.cpp also rounds the *activations* of a matrix product to the weights' 16-bit type.
    "F16": 5e-5,
    "BF16": 5e-4,
}

#: transformers' own GGUF loader against the reference rounded as the file is, torch's kernels on both sides. Measured
#: on tiny models of its 4 families in F32, F16 and BF16: 0.
LOADER_MAX_ABS: Final = 1e-5
#: And of a quantised file against llama.cpp, which rounds activations to 8 bits. Measured over 48 positions of SmolLM2:
#: 1.1e-2 in Q8_0, 1.3e-2 in Q4_0; on the tiny models up to 9e-4. A loader that computes wrongly: up to 1.2.
LOADER_KL: Final = 5e-2

#: A quantised artifact is judged by its excess over the same quantisation of the untuned base, as a share of that
#: quantisation's own mean KL: quantisation is the base's affair, tuning must not make it worse. Measured
#: in 20 families, but for mixtures: up to 0.019 in Q8_0, Q4_0, int8 and int4.
QUANTISED_EXCESS: Final = 0.10

#: What is wrong with the base's quantisation and the artifact's alike is no excess, so the base's own median KL has a
#: limit: a model that says something else. Measured in Q8_0: up to 1.9e-3 in 20 families, 5e-3 on SmolLM2; in
#: Q4_0 up to 0.16 and 0.32, in Q4_K_M on SmolLM2 0.12; in int4 of ONNX up to 0.084.
QUANTISED_KL: Final = {"Q8_0": 2e-2, "coarser": 1.0}

#: The excess is a difference of means over positions, and where its standard error is large it may be this many of
#: them. Means over a long tail are far from normal: of 2,000 draws of 1,280 lognormal positions, as those of SmolLM2 in
#: Q8_0 are spread, but without anything in common, the largest was 4.3 (an excess of 0.23). Measured on SmolLM2 with
#: four trained tokens, 1,282 positions: 1.4 in Q8_0, -0.3 in Q4_0, with standard errors of 0.023 and 0.019.
#: A router's choice between experts is a jump: noise near a tie sends a token another way, and a few such positions
#: make most of the mean. On tiny mixtures, 2 families, Q8_0, Q4_0, BF16 and F16, 5 seeds: up to 2.5, where the same
#: excess of the median, which no few positions move, stays within 0.07 and keeps its limit.
EXCESS_ERRORS: Final = 5.0
#: Of a mixture, whose median has a limit beside it.
ROUTED_ERRORS: Final = 4.0

#: Greedy decoding is compared up to a step where the reference's two best tokens are this close: below the noise of
#: the runtime the order of two logits is a coin toss.
GREEDY_MARGIN: Final = 1e-3
GREEDY_TOKENS: Final = 64

#: Merged values against the same sums in float64, in units of the last place of their storage: rounding once is half
#: a unit, and a sum that lies near the middle between two values may fall to the other side.
MERGED_ULPS: Final = 1.0
#: Noise of sums of float32 products and of DoRA's norms, as a share of the largest value of the row. Measured on random
#: factors of rank 4 to 64: up to 1.4e-6 of it.
MERGED_F32_NOISE: Final = 4e-6

#: A LoRA adds a product to the base's row: its factors are rounded once, in the dtype of the file, and an update may be
#: several times larger than the row that comes out. As shares of that row's largest value.
LORA_NOISE: Final = {"F32": 2e-6, "F16": 4e-3, "BF16": 3e-2}

#: A trained row may be stored off by at most what training changed about it, ‖stored - new‖ ≤ ‖new - base‖: beyond that
#: the stored row is farther from the trained one than the untouched base row is, and the change has drowned. Measured
#: on 400 rows of SmolLM2, the largest share: moved by half the matrix's deviation 0.03 in Q8_0, 0.24 in Q5_0, 0.46 in
#: Q4_0; by a tenth of it 0.14, 1.2 and 2.3.
ROW_ERROR_SHARE: Final = 1.0

#: Rows of a quantised tensor that have the bytes they get here, as a share: above it the same quantiser made all of
#: them, and a row with others is a fault. Measured on SmolLM2 in Q8_0 and Q4_K_M without an importance matrix: all.
QUANTISED_IDENTICAL: Final = 0.5
#: The error of a row whose quantiser makes other bytes, as a multiple of that of the row quantised here: an importance
#: matrix trades the error of what does not matter for that of what does. Measured on rows of SmolLM2, of normal and of
#: t-distributed numbers, 13 types, importances of lognormal spread: with a deviation of e, up to 1.2 a row and 1.05 in
#: the median of a tensor; of e², which is importances 3,000 times apart, up to 3.4 (Q6_K) and 1.15; the median stays
#: below 1.25 even with e³. Another row of the same tensor is off by 4 (Q2_K) to 200 (Q8_0) times.
QUANTISED_ERROR: Final = 4.0
QUANTISED_ERROR_MEDIAN: Final = 1.5
#: The same of types that look at no importance. Measured: 1.0, whatever the quantiser was told.
QUANTISED_ERROR_PLAIN: Final = 1.1
#: An update that is smaller than the error of the type is seen in no row, but in the sum over a tensor: its projection
#: on the update, as a multiple of it, may be off by this share and by this many standard errors. An update that is
#: missing is off by 1, and so is one that was added twice.
UPDATE_SHARE: Final = 0.1
UPDATE_ERRORS: Final = 5.0
#: A matrix so near to a sum, or to its base, by the norm of the difference as a share, is meant to be that sum; int4 in
#: blocks of 32 is off by 0.11 of normal numbers, and two matrices of one model by 1.4.
SUM_NEAR: Final = 0.5

#: A table of cosines is made in float32: the number itself is off by its rounding, and its angle by some units of the
#: last place for every radian. Measured over all families: up to 0.28 of this.
ROTARY_ABS: Final = {"F32": 1e-6, "F16": 2.5e-4, "BF16": 2e-3}
ROTARY_PER_RADIAN: Final = 4e-7
