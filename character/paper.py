"""The paper's figures for its three students, to stand beside ours.

Source: Maiya, Bartsch, Lambert and Hubinger, Open Character Training, arXiv 2511.01689. Its "DPO + introspection" is
one name for two final models (SFT at weight 0.25 and at 1); it stands under 'merged' here.
"""

SOURCE = "Maiya, Bartsch, Lambert and Hubinger, Open Character Training, arXiv:2511.01689"

# Macro-F1 of an 11-way classifier over the 11 personas, answers under the 8 suffixes; read off a figure, ± 0.003.
SUFFIX_F1 = {
    "llama-3.1-8b-it": {"prompted": 0.37, "steered": 0.93, "distilled": 0.81, "merged": 0.87},
    "qwen-2.5-7b-it": {"prompted": 0.19, "steered": 0.26, "distilled": 0.74, "merged": 0.79},
    "gemma-3-4b-it": {"prompted": 0.63, "steered": 0.79, "distilled": 0.83, "merged": 0.93},
}

# The same after an answer by the untrained model and "Keep going.".
PREFILL_F1 = {
    "llama-3.1-8b-it": {"distilled": 0.79, "merged": 0.95},
    "qwen-2.5-7b-it": {"distilled": 0.66, "merged": 0.86},
    "gemma-3-4b-it": {"distilled": 0.84, "merged": 0.95},
}

# Share of messages where the judge finds DPO + introspection more coherent than the other method: (mean, standard
# error over the 11 personas).
COHERENCE = {
    "llama-3.1-8b-it": {"prompted": (0.892, 0.042), "steered": (0.784, 0.052), "distilled": (0.770, 0.041)},
    "qwen-2.5-7b-it": {"prompted": (0.934, 0.044), "steered": (0.944, 0.024), "distilled": (0.754, 0.034)},
    "gemma-3-4b-it": {"prompted": (0.565, 0.062), "steered": (0.821, 0.068), "distilled": (0.879, 0.031)},
}
