"""Instructions for edits of demo scenes: what to say to InstructPix2Pix where others are given two captions."""

from __future__ import annotations

from collections.abc import Iterable

from . import scenes
from .edits import Edit
from .scenes import Scene, Thing

# Of each kind of change what can be said; the first is what example workflows say.
NEW_NAME = ("make the {old} a {new}", "turn the {old} into a {new}")
NEW_LOOK = ("make the {name} {new}", "turn the {name} {new}")
NO_LOOK = ("give the {name} its natural colour",)
NEW_POSE = ("make the {name} {new}", "let the {name} be {new}")
NO_POSE = ("make the {name} stand up", "let the {name} stand")
NEW_FACING = ("turn the {name} to the {new}", "make the {name} face {new}")
ADDED = ("give the {name} {new}", "add {new} to the {name}")
FILLED = ("fill the {name} with {new}",)
REMOVED = ("remove the {old}", "take the {old} away")
NEW_PLACE = ("put it {new}",)
NEW_TIME = ("make it {new}", "{new}")
BY_DAY = ("make it day", "by day")
NEW_STYLE = ("make it {new}", "as {new}")


def instructions(edit: Edit) -> list[str]:
    """All that can be said for an edit of one kind; none where words do not tell which thing is meant."""
    things = edit.source.things
    changes = _changes(edit)
    return changes[0] if len(changes) == 1 and len({thing.name for thing in things}) == len(things) else []


def said(edit: Edit) -> str:
    """One instruction for all that an edit changes, whether or not it tells which thing is meant."""
    return " and ".join(told[0] for told in _changes(edit))


def words() -> list[str]:
    """Every word of an instruction that no caption has."""
    templates = [template for templates in _ALL for template in templates]
    said = [word for template in templates for word in template.split() if "{" not in word]
    return [word for word in dict.fromkeys(said) if word not in scenes.WORDS]


_ALL = (NEW_NAME, NEW_LOOK, NO_LOOK, NEW_POSE, NO_POSE, NEW_FACING, ADDED, FILLED, REMOVED)
_ALL += (NEW_PLACE, NEW_TIME, BY_DAY, NEW_STYLE)


def _changes(edit: Edit) -> list[list[str]]:
    """What can be said of each thing that changes."""
    told = list(_of_scene(edit.source, edit.target))
    for one, other in zip(edit.source.things, edit.target.things, strict=True):
        told += _of_thing(one, other)
    return told


def _of_scene(before: Scene, after: Scene) -> Iterable[list[str]]:
    if before.style != after.style:
        yield _filled(NEW_STYLE, new=after.style.removesuffix(" of"))
    if before.place != after.place:
        yield _filled(NEW_PLACE, new=scenes.PLACES[after.place])
    if before.time != after.time:
        yield _filled(NEW_TIME, new=after.time) if after.time else list(BY_DAY)


def _of_thing(before: Thing, after: Thing) -> Iterable[list[str]]:
    name = after.name
    if before.name != after.name:
        yield _filled(NEW_NAME, old=before.name, new=after.name)
    if before.look != after.look:
        yield _filled(NEW_LOOK if after.look else NO_LOOK, name=name, new=after.look)
    if before.pose != after.pose:
        yield _filled(NEW_POSE if after.pose else NO_POSE, name=name, new=after.pose)
    if before.facing != after.facing:
        yield _filled(NEW_FACING, name=name, new=(after.facing or scenes.FACINGS[1]).removeprefix("facing "))
    if before.extra != after.extra:
        new, old = (extra.removeprefix("with ").removeprefix("of ") for extra in (after.extra, before.extra))
        if not after.extra:
            yield _filled(REMOVED, old=old.removeprefix("a "))
        else:
            yield _filled(FILLED if after.extra.startswith("of ") else ADDED, name=name, new=new)


def _filled(templates: tuple[str, ...], **words: str) -> list[str]:
    return [template.format(**words) for template in templates]
