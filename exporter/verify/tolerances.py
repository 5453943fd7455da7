"""The limits of all numeric checks, each with its reason. For each limit, a test proves that the check can fail.

"20 families" means a tiny model of each family; benchmarks/tolerances.md lists the values by family.
"""

from __future__ import annotations

from typing import Final

#: Merged checkpoint in transformers against the unmerged adapter in stock PEFT, both fp32, same kernels: only the
#: order of additions differs. Measured: 0 in 20 families and on SmolLM2; one ulp of a logit of 100 is 7.6e-6.
HF_MAX_ABS: Final = 1e-5
#: For sums of base and update that are stored in 16 bits: fp32 noise rounds a few in 100,000 to the other neighbour.
#: The limit is a share of the effect that the rounding as a whole has on the logits; another check compares every
#: stored value.
HF_ROUNDING_SHARE: Final = 0.1

#: ONNX Runtime's fp32 kernels against torch's. Measured on SmolLM2, texts of 20 to 40 tokens: up to 1.3e-4, where
#: torch's own fp32 is up to 1.7e-4 from its float64. In 20 families up to 1.3e-5, also with cache and padding.
ONNX_MAX_ABS: Final = 2e-4

#: ONNX in float16 computes in float16, activations and cache included. Measured on SmolLM2: 1.1e-5; 20 families: 5e-6.
ONNX_HALF_KL: Final = 1e-4

#: A quantised ONNX graph against itself in another run mode: the kernels for one row and for many rows add in a
#: different order, which changes how some activations are rounded to 8 bits. Measured on SmolLM2, int8 and int4: up to
#: 4.8e-3. Queries rotated one position too far when a cache is in use: 0.26 on a tiny model.
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
#: The same loader on a quantised file against llama.cpp, which rounds activations to 8 bits. Measured over 48 positions
#: of SmolLM2: 1.1e-2 in Q8_0, 1.3e-2 in Q4_0; on the tiny models up to 9e-4. For models that the loader computes
#: wrongly: up to 1.2.
LOADER_KL: Final = 5e-2

#: For quantised artifacts: the excess of the mean KL over that of the untuned base in the same quantisation, as a share
#: of the latter. The loss from quantisation itself is accepted; tuning must not increase it. Measured in 20 families
#: without mixtures of experts: up to 0.019 in Q8_0, Q4_0, int8 and int4.
QUANTISED_EXCESS: Final = 0.10

#: The excess check cannot see errors that the quantised base shares, so the base's own median KL has a limit, too:
#: beyond it the quantised base is a different model. Measured in Q8_0: up to 1.9e-3 in 20 families, 5e-3 on SmolLM2;
#: in Q4_0 up to 0.16 and 0.32, in Q4_K_M on SmolLM2 0.12; in int4 of ONNX up to 0.084.
QUANTISED_KL: Final = {"Q8_0": 2e-2, "coarser": 1.0}

#: The excess is a difference of means over positions. Where its standard error is large, it may be this many standard
#: errors. Means over a long tail are far from normal: in 2,000 draws of 1,280 lognormal positions, spread as those of
#: SmolLM2 in Q8_0 but independent, the largest was 4.3 (an excess of 0.23). Measured on SmolLM2 with four trained
#: tokens, 1,282 positions: 1.4 in Q8_0, -0.3 in Q4_0, with standard errors of 0.023 and 0.019.
EXCESS_ERRORS: Final = 5.0
#: The same for mixtures of experts. A router's choice is discontinuous: noise near a tie sends a token to another
#: expert, and a few such positions make up most of the mean. Measured on tiny mixtures of experts, 2 families, Q8_0,
#: Q4_0, BF16 and F16, 5 seeds: up to 2.5. Few positions do not move the median: its excess stays within 0.07 and keeps
#: the limit of other models.
ROUTED_ERRORS: Final = 4.0

#: In greedy decoding another token passes if the reference's logit of that token is this close to its best one: below
#: the noise of the runtime the order of two logits is arbitrary.
GREEDY_MARGIN: Final = 1e-3
GREEDY_TOKENS: Final = 64

#: Merged values against the same sums in float64, in units of the last place (ulp) of their storage: rounding once
#: costs half a unit, and a sum near the middle between two values may be rounded to either.
MERGED_ULPS: Final = 1.0
#: Noise of sums of float32 products and of DoRA's norms, as a share of the largest value of the row. Measured on random
#: factors of rank 4 to 64: up to 1.4e-6.
MERGED_F32_NOISE: Final = 4e-6

#: A LoRA adds a product to the base's row. Its factors are rounded once, to the dtype of the file, and an update may be
#: several times larger than the resulting row. As a share of that row's largest value.
LORA_NOISE: Final = {"F32": 2e-6, "F16": 4e-3, "BF16": 3e-2}

#: The storage error of a trained row may be at most as large as the change by training, ‖stored - new‖ ≤ ‖new - base‖:
#: beyond that the stored row is farther from the trained one than the untouched base row is, and the change is below
#: quantisation noise. Measured on 400 rows of SmolLM2, the largest share: rows moved by half the matrix's standard
#: deviation 0.03 in Q8_0, 0.24 in Q5_0, 0.46 in Q4_0; by a tenth of it 0.14, 1.2 and 2.3.
ROW_ERROR_SHARE: Final = 1.0

#: Share of the rows of a quantised tensor that equal the rows quantised here, byte for byte. Above it the same
#: quantiser made the whole tensor, and a row with other bytes is a fault. Measured on SmolLM2 in Q8_0 and Q4_K_M
#: without an importance matrix: all rows.
QUANTISED_IDENTICAL: Final = 0.5
#: For other quantisers: the error of a row as a multiple of the error of the row quantised here. An importance matrix
#: lowers the error of important columns and raises that of the others. Measured on rows of SmolLM2, of normal and of
#: t-distributed numbers, 13 types, lognormal importances: with a deviation of e, up to 1.2 for a row and 1.05 for the
#: median of a tensor; with e², which puts importances 3,000 times apart, up to 3.4 (Q6_K) and 1.15; the median stays
#: below 1.25 even with e³. A different row of the same tensor has 4 (Q2_K) to 200 (Q8_0) times the error.
QUANTISED_ERROR: Final = 4.0
QUANTISED_ERROR_MEDIAN: Final = 1.5
#: The same for types that the quantiser rounds without importances. Measured: 1.0 with every importance matrix.
QUANTISED_ERROR_PLAIN: Final = 1.1
#: An update that is smaller than the quantisation error shows in no single row, only in the sum over a tensor. The
#: stored tensor's projection on the update, as a multiple of the update, may differ from 1 by this share plus this many
#: standard errors. It differs by 1 for an update that is missing or was added twice.
UPDATE_SHARE: Final = 0.1
UPDATE_ERRORS: Final = 5.0
#: A matrix is taken for a sum if the norm of its difference from the sum, or from the base in it, is below this share
#: of the norm. int4 in blocks of 32 differs by 0.11 for normal numbers, two matrices of one model differ by 1.4.
SUM_NEAR: Final = 0.5

#: A table of cosines is computed in float32: each number has the rounding error of its storage, and its angle an error
#: of some units of the last place per radian. Measured over all families: up to 0.28 of this limit.
ROTARY_ABS: Final = {"F32": 1e-6, "F16": 2.5e-4, "BF16": 2e-3}
ROTARY_PER_RADIAN: Final = 4e-7
