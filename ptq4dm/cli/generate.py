"""`ptq4dm generate`: images, one PNG per seed."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from ..caching.cached_steps import cached_steps
from ..checks import seeds_of
from ..errors import UserError
from ..files.pictures import opened_picture
from ..files.places import picture_place
from ..pipelines.generate import generate, save_grid
from ..training.personalization.embedding_file import check_used, embedding_digest, load_embedding
from .computing import add_optimize, add_reuse, check_optimize, conditions, optimized, reused
from .options import (
    BATCH_SIZE,
    QUANTIZED_FIRST,
    add_conditioning,
    add_model,
    add_sampler,
    add_steps,
    conditioning_of,
    default_model,
    load,
    steps_of,
)
from .output import main_process, result, say

GOES_ON = "the same command"


def add(parser) -> None:
    add_model(parser, None, QUANTIZED_FIRST)
    parser.add_argument("--num-images", type=int, default=16, help="one for each seed, from --seed on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; the next has seed + 1")
    add_steps(parser)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="images at once")
    parser.add_argument("--output", default="out/images", help="folder of the PNGs; only missing ones are made")
    parser.add_argument("--picture", metavar="PNG", help="all images on one picture; OUTPUT.png unless given")
    text = "of `personalize`, or a textual inversion of diffusers: its file, or the folder of it"
    parser.add_argument("--embedding", metavar="FILE", help=text)
    add_optimize(parser)
    add_reuse(parser)
    add_sampler(parser)
    add_conditioning(parser)


def run(args) -> None:
    model = default_model(args)
    if args.num_images < 1:
        raise UserError(f"{args.num_images} images asked for; --num-images must be at least 1.")
    check_optimize(args)
    seeds = seeds_of(range(args.seed, args.seed + args.num_images))
    picture = Path(args.picture or f"{args.output}.png")
    if os.path.realpath(picture.parent) == os.path.realpath(args.output):
        raise UserError(f"{picture} would lie among the images, and count as one; give --picture another folder.")
    if args.picture or picture.parent.is_dir():  # else it is made with the folder of the images
        picture_place(picture)
    given = conditioning_of(args)
    pipe = load(args, model)
    more: dict[str, object] = {}
    if args.embedding:
        check_used(pipe, args.embedding, load_embedding(pipe, args.embedding), given["conditioning"] or {}, seeds)
        more["embedding"] = embedding_digest(args.embedding)
    done = optimized(args, model, pipe)
    plan = reused(args, pipe, given)
    more |= conditions(args, done is not None, plan)
    with nullcontext() if plan is None else cached_steps(pipe, plan) as cache:
        paths = generate(
            pipe,
            seeds,
            args.output,
            num_inference_steps=steps_of(args, pipe),
            batch_size=args.batch_size,
            metadata={"model": str(model), **more},
            **given,
        )
    if main_process():
        with opened_picture(paths[0]) as image:
            scale = max(1, 128 // image.width)
        save_grid(paths, picture, columns=min(8, len(paths)), scale=scale)
        say(f"{len(paths)} image{'s' * (len(paths) != 1)} of {model}: {args.output}")
        say(f"picture: {picture}")
        result(model=model, output=args.output, images=paths, picture=picture)
        if plan is not None and cache is not None:
            plan.save(kept := Path(f"{args.output}.reuse.json"))
            say(f"{cache}\nplan: {kept}")
            result(reuse=kept, calls_computed=cache.computed, calls_reused=cache.reused)
        if done is not None:
            say(str(done))
            result(optimized=str(done).splitlines())
