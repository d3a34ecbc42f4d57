"""Loaded by ms-swift where DeepSpeed trains on the CPU (`external_plugins`): DeepSpeed must not compile its shared-memory op.

Without this, DeepSpeed 0.19 calls a C++ compiler as soon as its CPU backend starts; marked as not compatible, gloo does the communication.
"""

import deepspeed.ops

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
