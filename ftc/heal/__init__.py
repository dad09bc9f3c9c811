"""Healing: bringing a converted model back to what the original computed, first in closed form, then by distillation."""
