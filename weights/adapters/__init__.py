"""LoRA adapters on the vision tower: read, checked and merged as PEFT merges them."""
