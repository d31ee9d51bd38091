"""Few-shot training with prompts: PET, iPET, several masks, LM-BFF, and `hub few-shot`, which chooses among them."""
