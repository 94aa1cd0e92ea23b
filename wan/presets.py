"""How the makers of causal Wan models stream them, as they published it. Light: nodes read the names.

A window that makers give includes the block itself; `context_frames` does not. All of these models run without
guidance; those with the policy "rolling" make a clean pass at t = 0 after each block.
"""

from __future__ import annotations

from dataclasses import replace

from ..families.kv_policies import KEEP_KEYS, RECOMPUTE, RECOMPUTE_KEYS, ROLLING
from ..families.step_list import StepList
from ..families.stream_preset import StreamPreset

# What the models were distilled on, warped by shift 5: the same as 4 steps spaced evenly.
_FOUR_STEPS = StepList((1000, 750, 500, 250))

KREA_REALTIME = StreamPreset(
    name="Krea Realtime 14B",
    width=832,
    height=480,
    fps=16.0,
    steps=4,
    shift=5.0,
    kv_policy=RECOMPUTE,
    context_frames=3,
    frames_per_block=3,
    files=("krea",),
    source="github.com/krea-ai/realtime-video, configs/self_forcing_server_14b.yaml",
)
SELF_FORCING = replace(
    KREA_REALTIME,
    name="Self-Forcing 1.3B",
    kv_policy=ROLLING,
    context_frames=18,
    files=("self_forcing", "selfforcing"),
    source="github.com/guandeh17/Self-Forcing, configs/self_forcing_dmd.yaml: a cache of 21 latent frames",
)
CAUSAL_FORCING = replace(
    SELF_FORCING,
    name="Causal Forcing 1.3B, 3 frames a block",
    files=("chunkwise", "causal_forcing", "causalforcing"),
    source="github.com/thu-ml/Causal-Forcing, configs/causal_forcing_dmd_chunkwise.yaml",
    note="The makers run this checkpoint's raw weights, not the averaged ones, where the file has both.",
)
CAUSAL_FORCING_FRAMEWISE = replace(
    CAUSAL_FORCING,
    name="Causal Forcing 1.3B, 1 frame a block",
    context_frames=20,
    frames_per_block=1,
    files=("framewise", "frame_wise"),
    source="github.com/thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise.yaml",
    note="",
)
CAUSAL_FORCING_2_STEPS = replace(
    CAUSAL_FORCING_FRAMEWISE,
    name="Causal Forcing++ 1.3B, 2 steps",
    steps=2,
    timesteps=StepList((1000, 500)),
    first_block_timesteps=_FOUR_STEPS,
    files=("framewise*2step", "causalforcing*2step", "causal_forcing*2step"),
    source="github.com/thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise_2step.yaml",
)
CAUSAL_FORCING_1_STEP = replace(
    CAUSAL_FORCING_2_STEPS,
    name="Causal Forcing++ 1.3B, 1 step",
    steps=1,
    timesteps=StepList((1000,)),
    files=("framewise*1step", "causalforcing*1step", "causal_forcing*1step"),
    source="github.com/thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise_1step.yaml",
)
LONGLIVE = replace(
    SELF_FORCING,
    name="LongLive 1.3B",
    context_frames=9,
    sink_frames=3,
    on_prompt_change=RECOMPUTE_KEYS,
    files=("longlive",),
    source="github.com/NVlabs/LongLive, configs/longlive_mr2v_inference.yaml: window 12, sink 3",
    note="LongLive is a base and a LoRA: put its lora.pt on it with Stream LoRA at strength 1.",
)
MEMFLOW = replace(
    LONGLIVE,
    name="MemFlow 1.3B",
    on_prompt_change=KEEP_KEYS,
    files=("memflow",),
    source="github.com/KlingTeam/MemFlow, configs/interactive_inference.yaml: window 12, sink 3",
    note=(
        "MemFlow's memory bank is not used here, and the model is a base and a LoRA: put its LoRA on it with Stream "
        "LoRA at strength 1."
    ),
)
REWARD_FORCING = replace(
    SELF_FORCING,
    name="Reward Forcing 1.3B",
    context_frames=6,
    sink_frames=3,
    files=("reward_forcing", "rewardforcing"),
    source="github.com/geezhi/Gibbs-Candidate-Matching, configs/reward_forcing.yaml: local_attn_size 9, sink_size 3",
    note="Reward Forcing averages what leaves the window into its sink; here the sink keeps the first frames.",
)
STREAM_DIFFUSION = replace(
    SELF_FORCING,
    name="StreamDiffusionV2 1.3B",
    shift=8.0,
    timesteps=StepList((1000, 750, 500, 250), raw=True),
    files=("streamdiffusion", "stream_diffusion"),
    source="github.com/chenfengxu714/StreamDiffusionV2, configs/wan_causal_dmd_t2v.yaml: steps not warped, cache of 21",
)
STREAM_DIFFUSION_VIDEO = replace(
    STREAM_DIFFUSION,
    name="StreamDiffusionV2 1.3B, video to video",
    steps=2,
    timesteps=StepList((700, 500), raw=True),
    context_frames=5,
    frames_per_block=1,
    sink_frames=3,
    files=(),
    source="github.com/chenfengxu714/StreamDiffusionV2, configs/wan_causal_dmd_v2v.yaml: cache of 6, sink 3",
    note="These steps begin at t = 700, from a noised video: without one, choose the preset for text.",
)
LONGLIVE_2 = replace(
    SELF_FORCING,
    name="LongLive 2.0 5B",
    width=1280,
    height=704,
    fps=24.0,
    context_frames=24,
    frames_per_block=8,
    sink_frames=8,
    files=("longlive",),
    source="github.com/NVlabs/LongLive (7860ad9), configs/inference.yaml: window 32, sink 8, 1280x704 at 24 a second",
    note=(
        "LongLive 2.0's own code samples with a multi-step solver, and marks scene cuts (a sink per shot, a jump in "
        "time); here each step adds new noise, as in other programs that run it, and cuts are not marked."
    ),
)

# The first one of a family is taken where nothing says which model it is; narrower patterns stand before wider ones.
WAN_21_PRESETS = (
    KREA_REALTIME,
    CAUSAL_FORCING_1_STEP,
    CAUSAL_FORCING_2_STEPS,
    CAUSAL_FORCING_FRAMEWISE,
    CAUSAL_FORCING,
    SELF_FORCING,
    LONGLIVE,
    MEMFLOW,
    REWARD_FORCING,
    STREAM_DIFFUSION,
    STREAM_DIFFUSION_VIDEO,
)
WAN_22_PRESETS = (LONGLIVE_2,)
# By the transformer's width: 1.3B.
UNNAMED = {1536: SELF_FORCING}
