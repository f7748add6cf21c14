"""Applying a config to a model: what each linear becomes, why the others stay, and what that saves.

`plan` decides, from names alone; `apply` carries the plan out on a model in memory; the diffusers integration carries out
the same plan while a checkpoint loads.
"""
