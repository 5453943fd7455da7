"""The pass limits of all numeric checks of the verification, each with a comment that explains the limit.

For each limit, the tests contain a case in which a check exceeds the limit and fails.

In the comments of this module, "20 families" means one tiny model from each of 20 model families. The file
benchmarks/tolerances.md lists the measured values for each model family.
"""

from __future__ import annotations

from typing import Final

#: Largest difference between logits of a merged checkpoint in transformers and of the unmerged adapter in stock PEFT.
#: Both models run in fp32 with the same kernels, so only the order of additions differs. Measured: 0 in 20 families and
#: on SmolLM2. For comparison, one ulp of a logit of 100 is 7.6e-6.
HF_MAX_ABS: Final = 1e-5
#: Limit for sums of base and update that are stored in 16 bits. Noise in fp32 rounds a few of 100,000 sums to the other
#: neighbouring value. The limit is a share of the effect that all rounding has on the logits. A separate check compares
#: every stored value.
HF_ROUNDING_SHARE: Final = 0.1

#: Largest difference between logits of ONNX Runtime and of torch, with fp32 kernels in ONNX Runtime and in torch.
#: Measured on SmolLM2 with texts of 20 to 40 tokens: up to 1.3e-4. On these texts, torch in fp32 differs from torch in
#: float64 by up to 1.7e-4. Measured in 20 families: up to 1.3e-5, also with cache and padding.
ONNX_MAX_ABS: Final = 2e-4

#: KL limit for ONNX in float16, which also has its activations and its cache in float16. Measured: 1.1e-5 on SmolLM2,
#: 5e-6 in 20 families.
ONNX_HALF_KL: Final = 1e-4

#: KL limit for a quantised ONNX graph against the same graph in another run mode. The kernels for one row and for many
#: rows add in a different order, which changes how some activations are rounded to 8 bits. Measured on SmolLM2 in int8
#: and int4: up to 4.8e-3. An error that rotated queries one position too far with a cache gave 0.26 on a tiny model.
ONNX_MODES_KL: Final = 2e-2

#: KL limits for llama.cpp, which computes with float32 weights and a float32 cache, so only the order of additions
#: differs. Measured in 20 families: up to 1.4e-7 in F32, 2.2e-6 in F16 and 1.6e-4 in BF16. Measured on SmolLM2 in BF16:
#: 1.5e-4.
GGUF_KL: Final = {
    "F32": 1e-6,
    # llama.cpp also rounds the *activations* of a matrix product to the weights' 16-bit type.
    "F16": 5e-5,
    "BF16": 5e-4,
}

#: Largest difference between logits of the GGUF loader of transformers and of the reference with the rounding of the
#: file. Loader and reference use torch's kernels. Measured on tiny models of the loader's 4 families in F32, F16 and
#: BF16: 0.
LOADER_MAX_ABS: Final = 1e-5
#: KL limit for the GGUF loader of transformers against llama.cpp on a quantised file. llama.cpp rounds activations to 8
#: bits. Measured over 48 positions of SmolLM2: 1.1e-2 in Q8_0, 1.3e-2 in Q4_0. Measured on tiny models: up to 9e-4.
#: Measured on models that the loader computes wrongly: up to 1.2.
LOADER_KL: Final = 5e-2

#: Limit for the excess of a quantised artifact: the mean KL of the artifact minus the mean KL of the untuned base in
#: the same quantisation, as a share of the base's mean KL. The quantisation loss is accepted, but tuning must not
#: increase the loss. Measured in 20 families without mixtures of experts: up to 0.019 in Q8_0, Q4_0, int8 and int4.
QUANTISED_EXCESS: Final = 0.10

#: Limits for the median KL of the quantised base. The excess check cannot detect errors that the quantised base shares.
#: Beyond the limit, the quantised base is a different model. Measured in 20 families: up to 1.9e-3 in Q8_0, 0.16 in
#: Q4_0. Measured on SmolLM2: 5e-3 in Q8_0, 0.32 in Q4_0, 0.12 in Q4_K_M. Measured in int4 of ONNX: up to 0.084.
QUANTISED_KL: Final = {"Q8_0": 2e-2, "coarser": 1.0}

#: Largest excess in standard errors. The excess is a difference of means over positions, and a noisy excess may exceed
#: QUANTISED_EXCESS by chance. Means over a long tail are far from normal. In a simulation, each of 2,000 draws had
#: 1,280 independent lognormal positions with the spread of SmolLM2 in Q8_0, and the largest excess was 4.3 standard
#: errors (0.23). Measured on SmolLM2 with four trained tokens and 1,282 positions: 1.4 standard errors of 0.023 in
#: Q8_0, -0.3 standard errors of 0.019 in Q4_0.
EXCESS_ERRORS: Final = 5.0
#: Largest excess of a mixture of experts, in standard errors. A router's choice is discontinuous: near a tie, noise
#: sends a token to a different expert. A few positions with a different expert make up most of the mean. Measured on
#: tiny mixtures of experts of 2 families in Q8_0, Q4_0, BF16 and F16 with 5 seeds: up to 2.5. Few positions do not move
#: the median: the excess of the median stays within 0.07 and has the limit of other models.
ROUTED_ERRORS: Final = 4.0

#: Largest distance between the reference's best logit and the reference's logit of the token that an artifact chose in
#: greedy decoding. Below the noise of the runtime, the order of two logits is arbitrary.
GREEDY_MARGIN: Final = 1e-3
GREEDY_TOKENS: Final = 64

#: Largest distance of merged values from the same sums in float64, in units of the last place (ulp) of the storage.
#: Rounding once costs half a unit, and a sum near the middle of two storable values may be rounded up or down.
MERGED_ULPS: Final = 1.0
#: Noise of sums of float32 products and of DoRA's norms, as a share of the largest value of the row. Measured on random
#: factors of rank 4 to 64: up to 1.4e-6.
MERGED_F32_NOISE: Final = 4e-6

#: Largest error of a row with a LoRA added, as a share of the row's largest value. A LoRA adds a product to the base's
#: row. The factors of the product are rounded once, to the dtype of the file, and an update may be several times larger
#: than the resulting row.
LORA_NOISE: Final = {"F32": 2e-6, "F16": 4e-3, "BF16": 3e-2}

#: Largest storage error of a trained row as a share of the change by training, ‖stored - new‖ ≤ ‖new - base‖. Beyond
#: the limit, the stored row is farther from the trained row than the base's row is, and the change is below
#: quantisation noise. Largest share measured on 400 rows of SmolLM2 in Q8_0, Q5_0 and Q4_0: 0.03, 0.24 and 0.46 for
#: rows moved by half the matrix's standard deviation; 0.14, 1.2 and 2.3 for rows moved by a tenth of the standard
#: deviation.
ROW_ERROR_SHARE: Final = 1.0

#: Share of the rows of a quantised tensor that equal the rows quantised by the checker, byte for byte. Above this
#: share, the same quantiser made the whole tensor, and a row with different bytes is a fault. Measured on SmolLM2 in
#: Q8_0 and Q4_K_M without an importance matrix: all rows.
QUANTISED_IDENTICAL: Final = 0.5
#: Largest error of a row from a different quantiser, as a multiple of the error of the row quantised by the checker. An
#: importance matrix lowers the error of important columns and raises the error of unimportant columns. Measured in 13
#: types with lognormal importances, on rows of SmolLM2, of normal and of t-distributed numbers. With a deviation of e,
#: the error was up to 1.2 for a row and 1.05 for the median of a tensor. With e², where importances are 3,000 times
#: apart, the error was up to 3.4 (Q6_K) for a row and 1.15 for the median. With e³, the median stays below 1.25. A
#: different row of the same tensor has 4 (Q2_K) to 200 (Q8_0) times the error.
QUANTISED_ERROR: Final = 4.0
QUANTISED_ERROR_MEDIAN: Final = 1.5
#: Largest error of a row as above, for types that the quantiser rounds without importances. Measured: 1.0 with every
#: importance matrix.
QUANTISED_ERROR_PLAIN: Final = 1.1
#: Limits for an update that is smaller than the quantisation error and therefore visible only in the sum over a tensor.
#: The stored tensor is projected on the update. The projection, as a multiple of the update, may differ from 1 by
#: UPDATE_SHARE plus UPDATE_ERRORS standard errors. The projection differs from 1 by 1 if the update is missing or was
#: added twice.
UPDATE_SHARE: Final = 0.1
UPDATE_ERRORS: Final = 5.0
#: A matrix is identified as a sum of base and updates if the norm of its difference from the sum, or from the base
#: matrix, is below this share of the base matrix's norm. For normal numbers, int4 in blocks of 32 differs by 0.11. Two
#: different matrices of a model differ by 1.4.
SUM_NEAR: Final = 0.5

#: Limits for a table of cosines or sines, computed in float32. Each number has the rounding error of its storage, and
#: each angle has an error of some units of the last place per radian. Measured over all families: up to 0.28 of the
#: limit.
ROTARY_ABS: Final = {"F32": 1e-6, "F16": 2.5e-4, "BF16": 2e-3}
ROTARY_PER_RADIAN: Final = 4e-7
