"""The closed vocabulary of the tasks: which words, labels and registers occur, and how their text splits into tokens.

Filler words and keys are disjoint, so that a key never occurs as noise. ``PIECE`` is the pre-tokenizer's expression:
the embedded models' tokenizer uses the same one, so ``count_tokens`` is exact for text made of known pieces. No other
module of this room knows about tokens.
"""

from __future__ import annotations

import re

PIECE = (
    r"L[0-9]{3}(?![0-9])"  # a label is one token
    # a word takes the space after it when a value, register or label follows
    r"| ?[A-Za-z]{2,}(?: (?=[0-9]|[A-H](?![A-Za-z])|L[0-9]))?"
    r"| ?[a-z](?![A-Za-z])"
    r"|[A-Za-z]"
    r"|[0-9]"  # digits one by one
    r"| ?[^\sA-Za-z0-9]"
    r"|\s"
)
_PIECE = re.compile(PIECE)

REGISTERS = "ABCDEFGH"
OPERATORS = ("add", "sub", "max", "mul")
NUM_LABELS = 500
LABELS = tuple(f"L{i:03d}" for i in range(NUM_LABELS))

FILLER = tuple(
    """
    able about above across active actual after again against age ago agree air all almost alone along already also
    always among amount angle animal answer any apart appear area around arrive ask away baby back ball bank base
    basic be bear beat because become bed been before begin behind believe below beside best better between beyond
    big bit body book both bottom box boy bring broad brother build busy but buy call can care carry case catch cause
    center certain chair chance change character charge chart check child choose circle city class clean clear climb
    close cloth cold collect color come common compare complete consider contain continue control cook cool corner
    correct could count country course cover cross crowd cry current cut dance dark day deal decide deep degree design
    die differ direct discuss divide do doctor door double down draw dream dress drink drive drop dry during each early
    earn ease east eat edge effect eight either else end enemy energy engine enough enter equal even evening event ever
    every example except excite exercise expect explain face fact fair fall family famous far fast father favor fear
    feed feel feet fell few field fight figure fill final fine finger finish first fit five flat floor flow fly follow
    food foot force form forward found four free fresh friend front full fun game gather gave general gentle get girl
    give glad go good got govern grand gray great green grew group grow guess guide had hair half hand happen happy hard
    has hat have head hear heart heat heavy held help here high hit hold home hope hot hour house how huge human hurry
    idea image inch include industry interest invent job join joy jump just keep kept kind knew know lady large last
    late laugh law lay lead learn least leave left length less let letter level lie lift like line listen little live
    long look lost lot loud love low made main major make man many map mark market match matter may mean measure meet
    men method middle might mile mind minute miss modern moment money month more morning most mother motion move much
    music must name nation nature near necessary neck never new next night noise noon nor north nose noun now object
    observe occur off offer office often old once open opposite order original other our out over own page paint pair
    paper parent part party pass past path pattern pay people perhaps period person phrase pick piece place plain plan
    play please plural point poor pose position possible post pound power practice prepare present press pretty print
    probable problem process produce product proper protect prove provide pull push put quart question quick quiet quite
    race raise ran range rather reach read ready real reason receive record region reply rest result rich ride right
    rise road roll room root rope round row rub rule run said same saw say scale school science score search season seat
    second section seed seem select self sell send sense sent sentence separate serve settle seven several shall shape
    share sharp sheet shell shine shop short should shoulder shout show side sight sign silent similar simple since sing
    sister sit six size skill skin sleep slip slow small smell smile so soft soldier solution solve some son song soon
    sound south space speak special speech speed spell spend spoke spot spread square stand state stay step still stood
    """.split()
)

KEYS = tuple(
    """
    acorn alder alloy almond amber anchor anvil apple apron arrow aspen atlas autumn badger bagel bamboo banjo barley
    basil basket beacon beaver beetle berry birch bishop bison blanket blossom bonfire boulder bramble breeze brick
    bridge bronze bucket buffalo butter button cabin cactus camel candle canoe canyon carbon cargo carpet castle catfish
    cavern cedar cello chalk cheetah cherry chimney cinder citrus clover cobalt cobra coconut comet compass copper coral
    cotton cougar coyote cradle crane crater cricket crystal cypress daisy dagger dahlia desert diamond dolphin donkey
    dragon eagle ebony echo eclipse elbow ember emerald falcon fennel ferry fiddle flint flute forest fossil fountain
    fox frost galaxy garlic garnet gazelle geyser ginger giraffe glacier goblet goose granite grape gravel guitar hammer
    harbor harp hawk hazel hedge heron hickory honey hornet ice indigo iris iron island ivory ivy jacket jaguar jasmine
    jasper jewel jungle juniper kayak kettle kitten koala lagoon lantern lark lava lavender lemon leopard lilac lily
    lime linen lion lizard llama lobster locust lotus lynx magnet magpie mango maple marble meadow melon mercury meteor
    mint mirror mitten mole monsoon moose mosaic moss moth mountain mulberry mustard nectar needle nickel nutmeg oak
    oasis oat ocean olive onion onyx opal orange orchid otter owl oyster paddle palace panda panther parrot peach
    peacock pear pearl pebble pelican penguin pepper pigeon pine pirate planet platinum plum pony poppy prairie prism
    puffin pumpkin quail quartz rabbit raccoon radish raven reef ribbon robin rocket rose ruby saddle saffron salmon
    sapphire satin scarlet seal shark shadow silk silver skunk sparrow spider spruce squid stork sugar sunset swan
    thistle thunder tiger timber topaz tulip tundra turtle valley velvet violet volcano walnut walrus willow wolf zebra
    """.split()
)


def pieces(text: str) -> list[str]:
    """Split text the way the embedded models' tokenizer does; ``"".join(pieces(text)) == text``."""
    return _PIECE.findall(text)


def count_tokens(text: str) -> int:
    """Tokens of a text made of known pieces. Pass another tokenizer's count to the generators to aim at its lengths."""
    return len(_PIECE.findall(text))
