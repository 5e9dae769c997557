"""The size along which an op is drawn, and its name for people."""

# op -> size, label
AXES = {
    "attention": ("T", "tokens of a sequence"),
    "attention_options": ("T", "tokens of a sequence"),
    "attention_with_kv_cache": ("S", "tokens in the cache"),
    "cross_entropy": ("V", "classes"),
    "linear_cross_entropy": ("V", "classes"),
    "rms_norm": ("C", "width"),
    "apply_rotary": ("T", "tokens of a sequence"),
    "glu": ("I", "width"),
}
