"""`ptq4dm personalize`: a token, or a class row, learned from a few images by forward passes of a packed model."""

from __future__ import annotations

from ...errors import UserError
from ...training.personalization.config import PersonalizeConfig
from ...training.personalization.personalize import personalize
from ..flags import add_flags, given
from ..options import EXAMPLE, QUANTIZED, add_model, default_model, load, one_process
from ..output import result, say

NOTE = f"{QUANTIZED} where `quantize` made it"
GOES_ON = "the same command with --resume"


def add(parser) -> None:
    add_model(parser, None, NOTE)
    parser.add_argument("--images", metavar="DIR", required=True, help="folder of the images to learn from")
    what = parser.add_argument_group("what is learned")
    what.add_argument("--token", help="a new word, such as '<dog>', of a model of text")
    what.add_argument("--class-row", type=int, metavar="N", help="a row of a class-conditional model")
    what.add_argument("--init", help="what it starts as: a word that the model knows; of a row null, mean or a class")
    what.add_argument("--prompts", nargs="+", metavar="TEXT", help="texts with {} for the token; of image k text k")
    parser.add_argument("--output", default="out/personalized", help="folder of embedding, log and checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT")
    add_flags(parser.add_argument_group("training"), PersonalizeConfig)


def run(args) -> None:
    one_process(args)
    config = PersonalizeConfig(**given(args, PersonalizeConfig))
    model = default_model(args)
    if model == EXAMPLE:
        raise UserError(
            f"{EXAMPLE} has neither text nor classes to personalize; give another --model, such as dit-cifar10."
        )
    pipe = load(args, model)
    done = personalize(
        pipe,
        args.images,
        config,
        args.output,
        token=args.token,
        class_row=args.class_row,
        init=args.init,
        prompts=args.prompts,
        resume=args.resume,
    )
    first, last = done.log[0]["loss"], done.log[-1]["loss"]
    say(f"loss on fixed noise: {first:.5f} at the start, {last:.5f} after {done.log[-1]['step']} steps")
    say(f"embedding, for --embedding of generate: {done.path}")
    result(model=model, output=done.path, loss=last, start_loss=first, log=done.log)
