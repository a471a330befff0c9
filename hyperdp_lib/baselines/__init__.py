"""What DP-DeepSets is compared with: DP-SGD LoRA (`dp_lora`) and the controls (`controls`).

Each takes the same private images, base model, budget and neighbouring relation as `hyperdp_lib.release`.
"""
