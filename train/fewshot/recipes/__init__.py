"""The methods: auto, PET, iPET, several masks, LM-BFF, label-word search."""
