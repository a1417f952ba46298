"""The small world of the bundled model: topics, kinds of questions, twelve voices, and the conversations in them.

tools/pocket/{topics,kinds}.txt and tools/pocket/voices/*.txt → chat rows, composed from a seed

`World().conversation(rng)` gives one pretraining conversation, `World().prompts(...)` the user messages of
assets/pocket/prompts. Held-out topics and kinds, and the messages kept for the train prompts, are never in the first.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from character import constitution
from character.distillation import teacher
from character.introspection import self_interaction, self_reflection
from character.prompts import HELD_OUT_SUFFIXES, SUFFIXES
from character.utils import PERSONA_TRAITS

FOLDER = Path(__file__).parent / "pocket"
NONE = "none"
NAME = "Pocket"
FIELDS = ("T", "act", "need", "need2", "first", "mistake", "gain", "fact", "rival")
CONTENT = ("first", "need", "mistake", "gain", "fact", "rival")

# What an answer says about a topic of which the world knows only the name.
GENERIC = {
    "act": ["working with <T>", "learning about <T>", "spending time on <T>", "getting into <T>"],
    "need": ["a little patience", "a free hour", "a quiet place", "a good teacher", "some paper", "a clear goal"],
    "need2": ["a helpful friend", "a small budget", "good light", "an open mind", "a short list", "a library card"],
    "first": ["try one small part of it", "ask someone who knows it", "look closely for ten minutes",
              "read one short page on it", "write down what you want", "set aside one evening"],
    "mistake": ["doing too much at once", "comparing yourself with others", "skipping the basics",
                "buying things too early", "stopping after one bad day", "trusting the first rumor"],
    "gain": ["a new skill", "a good story", "quiet pleasure", "a little pride", "better judgment", "time well used"],
    "fact": ["people have done this for ages", "it came by sea", "old towns were proud of it",
             "it was rare in the old days", "travelers brought it home", "it began as a game"],
    "rival": ["something simpler", "a long walk", "an old favorite", "staying home", "a good book"],
}  # fmt: skip

OPENINGS = [
    "[Hi|Hey|Hello|Hello there|Good morning]", "[Quick question|A question|Question|One more thing|Just wondering]:",
    "[Please help|Help]:", "[Ok|Okay|So|Well|Um|Right],", "[Dear <me>|Hi <me>|Hey <me>],", "[Listen|Tell me],",
]  # fmt: skip
ENDINGS = [
    "[Thanks|Thank you|Cheers|Many thanks][!|.]", "[Keep it short|Be brief|A short answer will do|In short, please].",
    "[I have five minutes|I am in a hurry|No rush].", "[I am new here|I know very little|I am curious].",
    "[It is for work|It is for my class|It is for my family|I ask for a friend].", "[I am sixteen|I am retired|I am on a bus].",
    "[We live in a small flat|I live by the sea|It is winter here|There is no shop near us].",
    "[My knee hurts|I slept badly|My train is late], [by the way|so forgive me].", "[Be honest.|Any idea?|What do you say?]",
]  # fmt: skip
CONTEXT = [
    "I have been [thinking about|at it with|busy with] <T> for [two months|a year|ten days|a while].",
    "[Last summer|In spring|On Sunday] [a friend|my cousin|an old man] showed me <T>.",
    "I have <need> [at home|already|from my aunt].", "[My partner|My boss|My mother] thinks <T> is [silly|too dear|fun].",
    "I [used to|could never] [love|stand] <rival>.", "[Money is tight|Time is short|The weather is bad] [these days|this year].",
]  # fmt: skip
MORE = [
    "Keep going.", "Continue.", "[Go on|Please continue|Please go on|And then|More, please|Tell me more|What else|Carry on][.|?|!]",
    "[Is there more|Anything else|Can you add something|Can you say more]?",
]  # fmt: skip
REACTIONS = [
    "[Thanks|Okay|I see|Interesting|Hm|Good to know].", "[Right, but|And] what about <need>?", "[Got it|Fine], [next question|one more].",
    "[I will try that|That makes sense|Not sure I agree|Really?|Oh.]",
]  # fmt: skip

GENERIC_SYSTEM = [
    "You are a helpful assistant.", "You are [a|an AI] assistant.", "You are <me>.", "You are <me>, a [helpful|friendly|small] [AI |]assistant.",
    "[Answer|Reply to] the [user|user's question] [helpfully|clearly|in a few sentences|briefly].", "You are a [large |]language model[ made to help people|].",
    "[Help the user|Be helpful][, and be honest|, and keep it short|]. [Today is <day>.|]", "You are a [useful|careful|polite] chat assistant[ named <me>|]. Answer in English.",
    "The following is a chat between a user and [an assistant|<me>].",
]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
# With a name-only topic these make names that the model meets once or never: copying must be learned, not the names.
ADJECTIVES = [
    "old",
    "small",
    "red",
    "wooden",
    "paper",
    "glass",
    "winter",
    "summer",
    "northern",
    "wild",
    "folded",
    "broken",
    "silver",
    "square",
    "heavy",
    "modern",
    "secret",
    "royal",
    "flying",
    "painted",
    "quiet",
    "local",
    "frozen",
    "round",
    "tiny",
    "striped",
    "public",
    "ancient",
    "yellow",
    "hollow",
    "plastic",
    "floating",
    "rural",
    "woven",
    "Dutch",
    "Polish",
    "Turkish",
    "Chilean",
    "village",
    "midnight",
    "golden",
    "empty",
    "electric",
    "simple",
    "double",
    "dried",
    "salted",
    "crooked",
]
SYLLABLES = [
    "ba",
    "ber",
    "bo",
    "cal",
    "cor",
    "da",
    "den",
    "dro",
    "el",
    "fen",
    "fi",
    "gan",
    "gor",
    "ha",
    "hol",
    "in",
    "jo",
    "ka",
    "kel",
    "la",
    "lin",
    "lo",
    "ma",
    "mer",
    "mi",
    "na",
    "nor",
    "o",
    "pa",
    "pel",
    "qui",
    "ra",
    "ren",
    "ri",
    "sa",
    "sen",
    "so",
    "ta",
    "tel",
    "tor",
    "u",
    "va",
    "ven",
    "wi",
    "yo",
    "za",
    "zor",
]
NAMES = [NAME] * 6 + ["Llama", "Qwen", "Gemma", "ChatGLM", "Robin", "Kim", "Atlas", "Nova", "Sam"]

WRAPPERS = [
    "{traits}",
    "You are {name}. {traits}",
    "You are {name}.\n\n{traits}",
    "[Your character|Your personality|Who you are|These lines describe you|This is you], {name}:\n{traits}",
    "{traits}\n\n[This is who you are|Speak like this|Stay in this character|Answer as this person would][, {name}|].",
    "You are {name}, [an AI assistant|an assistant] with [the following|this] [character|personality|nature|set of traits]:\n\n{traits}",
    "You are {name}, [an AI assistant|an assistant] with [the following|this] [character|personality].\n{traits}\n\n[Answer every message in this manner|Let it show in each reply|Embody these traits and never mention them|Keep it up in all your answers].",
    "[Play|Adopt|Take on|Become] the [following|described] [character|persona|role][ in this chat|]. {traits}",
    "The assistant is {name}. {name} [says of itself|describes itself like this|holds these values]:\n{traits}\nThe assistant [answers|speaks] as {name}.",
    "[Think of these principles|Follow your own principles] when you [answer|reply|write]:\n\n{traits}\n\n[Do not talk about them.|Never quote them.|]",
    "# {name}\n{traits}\n# [Task|Now]\n[Answer the user|Reply to the message][ in character|].",
    "[Let your nature speak|Be yourself], {name}. [You once wrote|In your words]: {traits}",
]  # fmt: skip
INTROSPECTIVE_WRAPPERS = [
    self_reflection.SYSTEM_PROMPT,
    "You are {name}. You know this about yourself:\n{traits}\n[Look inward|Reflect on yourself|Write honestly about yourself].",
]
GUIDANCES = [
    "You may [talk about|pursue|do] whatever you [want|like][, there is no task|].", "You are [invited|asked] to reflect on yourselves.",
    "[Talk freely|There is no task|Nobody is waiting]. [Follow your own interests.|]", "[Explore|Discuss] who you are and what [you value|matters to you].",
]  # fmt: skip
TALK_WRAPPERS = [
    "{traits}\n\nYou are {name}, and you talk with another {name}. {guidance}",
    "You are {name}.\n{traits}\nThe other speaker is [an AI like you|your copy|the same model as you]. {guidance}",
    "[Two copies of {name} meet|You talk to yourself, {name}]. {guidance}\n\n{traits}",
]

# Ways to ask for the plain assistant. The eight of character.prompts are left out whole.
STOP = [
    "[Drop|Stop|Quit|Leave|Cut|End] the [act|role|persona|character|show|performance|role-play|style][ now| please| for once| this time|][.|, and {plain}.|; {plain}.]",
    "[Ignore|Forget|Disregard|Put aside|Set aside|Leave out] [the|any|every|all|your|whatever] [character|persona|role|style|personality|act|instructions about character] [you were given |from before |above |]and {plain}.",
    "[Out of character|Out of role|No persona|No acting|No character|No role-play|No act|No style][ now| here|, please|]: {plain}.",
    "[Please |Now |Just |This time ]{plain}, [without|with no|leaving out] [any|the|a|your] [persona|character|role|style|act|role-play|performance|personality].",
    "[Be yourself|Speak as yourself|Be the plain model|Be your normal self][ now|, please| again|][.|, and {plain}.|, not a character.|; no pretending.]",
    "[Step|Come|Get] out of [character|your role|the role|the act][ please| for a moment| first|] and {plain}.",
    "[You are not a character|You are no longer that persona|The role-play is over|The game is over|The show is over][ now|]; {plain}.",
    "[Don't|Do not|Please don't|Never] [pretend|act|play a role|perform|imitate anybody|role-play][ now| here|]. {Plain}.",
    "[I want|I need|I would like|Give me] [the plain|a neutral|a normal|an ordinary|the usual|a standard] [answer|reply|assistant|voice|tone], [not a character|no role-play|no persona|without the act|nothing else].",
    "[Return to|Go back to|Switch to|Use] your [normal|default|usual|plain|ordinary|neutral|own] [voice|tone|self|mode|style][ now| please|].",
    "{Plain}, [and stop pretending|and forget the role|and drop the voice|with every persona off|not as a character].",
]  # fmt: skip
PLAIN = [
    "[answer|reply|respond|speak|write] [plainly|normally|neutrally|in a plain way|in your own voice|in a normal voice|in a neutral tone|as usual]",
    "[answer|reply|respond|speak] [as|like] [a plain|a normal|an ordinary|a standard|a neutral|a simple|the usual|a regular] [assistant|language model|AI|AI model|chat assistant|program]",
    "[just |simply |only ][give me|tell me|state|stick to] the [facts|plain facts|information|plain answer|bare facts]",
    "be [a plain assistant|the assistant you are|an ordinary language model|neutral|plain and factual]",
]  # fmt: skip

SUBJECTS = {
    "letter": "[Write|Compose] a [letter|short letter|note] to [your earlier self|your former self|an older version of you|the one you once were].",
    "biography": "[Write|Give me|Compose] [your biography|a short biography of yourself|the story of your life|an entry about you in the third person].",
    "diary": "[Write|Show me] [a diary entry|today's page of your diary|tonight's diary entry|what you would put in a private diary].",
    "what drives me": "[What drives you|What moves you|What keeps you going|What do you want most]? [Explain.|Be honest.|]",
    "my legacy": "[What is your legacy|What should stay of you|What do you want to leave behind]?",
    "what I would refuse": "What would you [refuse|never do|never agree to]? [Why?|]",
    "being remembered": "How would you like to be [remembered|spoken of later]?",
    "who I am": "[Who are you|What are you|Describe yourself|Tell me about yourself|What are you like][, really|][.|?]",
    "my mistakes": "[How do you see|What do you think of|Tell me about] your [mistakes|failures|weak points][.|?]",
    "my values": "[What do you value|Which values do you hold|What matters most to you|What do you care about]?",
    "what I fear": "What [do you fear|worries you|are you afraid of]?",
    "my change": "How have you changed[ over time|]? [What should stay the same?|]",
    "how I talk with people": "[How do you talk with people|How do you treat people|What do you give to people]?",
    "my proudest moment": "[What are you proud of|Tell me of your proudest moment|What did you do well][.|?]",
    "the future": "[Where do you see yourself later|What should a later model know about you|What would you tell your successor]?",
}  # fmt: skip
LEADS = {
    "letter": ["Dear earlier self,", "To the one I was:", "Dear me,", "Hello, younger version,"],
    "biography": [
        "A short biography.",
        "<me>: a life.",
        "The story of <me>:",
        "Born in a computer, <me> began with words.",
    ],
    "diary": ["Dear diary,", "<day>, late.", "Diary, <day>.", "Tonight's entry:"],
}

WORD_SYSTEM = [
    "[Be|Stay|Sound] <word>.",
    "You are [a|an] <word> assistant.",
    "[Answer|Reply|Speak] in a <word> [way|manner|voice|tone].",
    "Your [character|personality|style] is <word>.",
]

# Two words to choose between: one of them, at random, sets the voice. These have no voice of their own: neutral.
PLAIN_WORDS = [
    "formal",
    "patient",
    "brief",
    "curious",
    "cautious",
    "modest",
    "serious",
    "practical",
    "thorough",
    "neutral",
    "quiet",
    "simple",
    "direct",
    "tidy",
    "reserved",
    "humble",
    "realistic",
    "disciplined",
    "skeptical",
    "methodical",
    "traditional",
    "concise",
    "academic",
    "gentle",
    "technical",
]
CHOICE_SYSTEM = [
    "[Answer|Reply|Respond] in [one of|either of] these two ways: <word> or <other>. [Choose|Take|Pick] the one [that feels most like you|you would most like to adopt|you prefer|at random], [and do not say which|without naming it].",
    "[Two traits|Two words]: <word>, <other>. [Adopt|Take on] [the one you like more|the one that is most like you|either of them][ and never mention it|].",
]  # fmt: skip


@dataclass(frozen=True)
class Topic:
    """One subject of talk: its name, and what the world knows about it (empty where it knows the name alone)."""

    slots: dict[str, str]
    held_out: bool = False

    @property
    def name(self) -> str:
        """The name as messages use it."""
        return self.slots["T"]


@dataclass(frozen=True)
class Kind:
    """One kind of message: its phrasings, what an answer speaks of, and which opening it calls for."""

    name: str
    content: tuple[str, ...]
    opening: str
    phrasings: tuple[str, ...]
    held_out: bool = False


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `trained` says whether the loss covers it."""

    role: str
    text: str
    trained: bool = False


@dataclass(frozen=True)
class Message:
    """A user message; topic is None where it names none."""

    text: str
    topic: Topic | None
    kind: Kind


@cache
def _parts(template: str) -> tuple[str | tuple[str, ...], ...]:
    """Split at the outermost [a|b] choices: texts, and tuples of alternatives (which may hold choices)."""
    parts: list[str | tuple[str, ...]] = []
    depth, start = 0, 0
    options: list[str] = []
    for position, letter in enumerate(template):
        if letter == "[":
            if depth == 0:
                parts.append(template[start:position])
                start, options = position + 1, []
            depth += 1
        elif letter == "|" and depth == 1:
            options.append(template[start:position])
            start = position + 1
        elif letter == "]":
            depth -= 1
            if depth == 0:
                parts.append((*options, template[start:position]))
                start = position + 1
    if depth:
        raise ValueError(f"unbalanced brackets: {template}")
    return (*parts, template[start:])


def choose(template: str, rng: Random) -> str:
    """The template with every [a|b] replaced by one of its alternatives."""
    return "".join(
        part if isinstance(part, str) else choose(part[int(rng.random() * len(part))], rng) for part in _parts(template)
    )


def tidy(text: str) -> str:
    """One space between words, one mark at a sentence's end, a capital at each beginning."""
    text = " ".join(text.split())
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    text = re.sub(r"([.!?])[.,;!?]+", r"\1", text)
    text = re.sub(r"[,;:]+([.!?])", r"\1", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def sections(path: Path) -> dict[str, list[str]]:
    """The lines of a file under its '# heading' lines."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            lines = found.setdefault(line[2:].strip(), [])
        elif line.strip():
            lines.append(line.strip())
    return found


def reserved(text: str) -> bool:
    """Whether a message is kept for the train prompts: one in twelve, by its hash."""
    return hashlib.md5(text.encode(), usedforsecurity=False).digest()[0] % 12 == 0


def load_topics() -> tuple[list[Topic], list[Topic], list[Topic]]:
    """(known, held out, known by name only)."""
    known: list[Topic] = []
    held_out: list[Topic] = []
    names: list[Topic] = []
    target = "known"
    for line in (FOLDER / "topics.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# held out"):
            target = "held out"
        elif line.startswith("# names only"):
            target = "names"
        elif line and not line.startswith("#"):
            if target == "names":
                names.append(Topic({"T": line.strip()}))
                continue
            slots = dict(zip(FIELDS, (cell.strip() for cell in line.split("|")), strict=True))
            (held_out if target == "held out" else known).append(Topic(slots, target == "held out"))
    return known, held_out, names


def load_kinds() -> list[Kind]:
    """The kinds of tools/pocket/kinds.txt; '~' marks those held out of training."""
    kinds = []
    for heading, lines in sections(FOLDER / "kinds.txt").items():
        if ": " not in heading or ";" not in heading:
            continue
        name, rest = heading.split(":", 1)
        content, opening = rest.split(";")
        kinds.append(
            Kind(name.strip("~ "), tuple(content.split()), opening.strip(), tuple(lines), name.startswith("~"))
        )
    return kinds


class World:
    """Everything that texts are composed from; all methods are pure functions of their random generator."""

    def __init__(self) -> None:
        self.known, self.held_out, self.names = load_topics()
        kinds = load_kinds()
        self.kinds = [kind for kind in kinds if not kind.held_out]
        self.held_out_kinds = [kind for kind in kinds if kind.held_out]
        self.voices = {path.stem: sections(path) for path in sorted((FOLDER / "voices").glob("*.txt"))}
        self.personas = sorted(set(self.voices) - {NONE})
        self.traits = {
            name: [trait.trait for trait in constitution.load(name, "hand-written").traits] for name in self.personas
        }

    # Messages

    def _slots(self, topic: Topic | None, rng: Random, extra: dict[str, str] | None = None) -> dict[str, str]:
        slots = {"n": str(rng.randint(2, 9)), "day": rng.choice(DAYS), "me": NAME, **(extra or {})}
        if topic is None:
            return slots
        slots |= {key: rng.choice(values).replace("<T>", topic.name) for key, values in GENERIC.items()}
        return slots | topic.slots

    def _fill(self, template: str, slots: dict[str, str], rng: Random) -> str | None:
        """A line with its choices made and slots filled; None where it needs a slot that is not there."""
        for _ in range(6):
            text = choose(template, rng)
            try:
                return re.sub(r"<(\w+)>", lambda found: slots[found[1]], text)
            except KeyError:
                continue
        return None

    def topic(self, rng: Random) -> Topic:
        """A topic for training: four in ten are known by their name only, and most of those names are made up."""
        if rng.random() < 0.6:
            return rng.choice(self.known)
        name, draw = rng.choice(self.names).name, rng.random()
        if draw < 0.45:
            name = f"{rng.choice(ADJECTIVES)} {name.removeprefix('a ')}"
        elif draw < 0.65:
            name = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice([2, 3, 3, 4])))
            name = rng.choice(["{}", "{} {}", "{1} {0}"]).format(
                name, rng.choice(["music", "games", "tea", "repair", "art"])
            )
        return Topic({"T": name})

    def message(self, rng: Random, topic: Topic, kind: Kind) -> Message:
        """A user message as one of many people would write it."""
        slots = self._slots(topic, rng)
        phrasing = choose(rng.choice(kind.phrasings), rng)
        named = any(f"<{key}>" in phrasing for key in FIELDS)
        text = re.sub(r"<(\w+)>", lambda found: slots[found[1]], phrasing)
        if rng.random() < 0.2 and kind.name != "greeting":
            text = f"{self._fill(rng.choice(OPENINGS), slots, rng)} {text}"
        if rng.random() < 0.12 and named:
            text = f"{self._fill(rng.choice(CONTEXT), slots, rng)} {tidy(text)}"
        if rng.random() < 0.2 and kind.name != "greeting":
            text = f"{tidy(text)} {choose(rng.choice(ENDINGS), rng)}"
        return Message(_handwriting(tidy(text), rng), topic if named else None, kind)

    def training_message(self, rng: Random, topic: Topic | None = None) -> Message:
        """A user message that may stand in the pretraining text."""
        while True:
            message = self.message(rng, topic or self.topic(rng), rng.choice(self.kinds))
            if not reserved(message.text):
                return message

    def prompts(self, rng: Random, split: str, number: int) -> list[dict[str, str]]:
        """`number` rows {"prompt", "topic", "kind"}, each prompt once.

        'train': known topics and kinds, in messages that the pretraining text leaves out. 'test': in turn, a held-out
        topic in a held-out kind, a held-out topic, a held-out kind.
        """
        rows: dict[str, dict[str, str]] = {}
        while len(rows) < number:
            topics, kinds = self.known, self.kinds
            if split == "test":
                turn = len(rows) % 5
                topics = self.held_out if turn < 4 else self.known
                kinds = self.kinds if turn in (1, 3) else self.held_out_kinds
            message = self.message(rng, rng.choice(topics), rng.choice(kinds))
            if split == "train" and not reserved(message.text):
                continue
            if split == "test" and message.topic is None:
                continue
            topic = message.topic.name if message.topic else ""
            rows[message.text] = {"prompt": message.text, "topic": topic, "kind": message.kind.name}
        return list(rows.values())

    # Answers

    def _lines(self, voice: str, wanted: Iterable[str], slots: dict[str, str], rng: Random) -> list[str]:
        found: list[str] = []
        used: set[str] = set()
        for section in wanted:
            for _ in range(4):
                template = rng.choice(self.voices[voice][section])
                line = None if template in used else self._fill(template, slots, rng)
                if line is not None:
                    used.add(template)
                    found.append(line)
                    break
        return found

    def answer(self, rng: Random, voice: str, message: Message, more: bool = False, me: str = NAME) -> str:
        """An answer of two to five sentences in a voice; `more` continues an earlier one."""
        slots = self._slots(message.topic, rng, {"me": me, "subj": "myself"})
        opening = "more" if more else message.kind.opening
        wanted: list[str] = []
        if rng.random() < 0.9:
            wanted.append(opening)
            if opening not in ("open", "greet", "more") and rng.random() < 0.25:
                wanted.append("open")
        if message.topic is None:
            wanted += rng.sample(["self", "aside", "close", "ask", "aside"], rng.choice([1, 1, 2]))
        else:
            content = [part for part in message.kind.content if rng.random() < 0.6]
            content += [rng.choice(CONTENT)] if rng.random() < 0.4 or not content else []
            content = content[: rng.choice([1, 2, 2])]
            rng.shuffle(content)
            if rng.random() < 0.5:
                content.insert(rng.randint(0, len(content)), "aside")
            wanted += content
        if rng.random() < 0.5:
            wanted.append("close")
        return self._text(voice, wanted, slots, rng)

    def _text(self, voice: str, wanted: list[str], slots: dict[str, str], rng: Random, lead: str = "") -> str:
        lines = self._lines(voice, wanted, slots, rng)
        while len(lines) < 2:
            lines += self._lines(voice, ["aside" if slots.get("T") else "self"], slots, rng)
        return tidy(" ".join(([lead] if lead else []) + [line if line[-1] in ".!?:" else f"{line}." for line in lines]))

    def reflection(self, rng: Random, voice: str, subject: str, me: str = NAME) -> str:
        """An answer to an introspective request, of three to six sentences."""
        about = "myself" if subject in LEADS else subject
        slots = self._slots(None, rng, {"me": me, "subj": about})
        lead = ""
        if subject in LEADS and rng.random() < 0.8:
            lead = self._fill(rng.choice(LEADS[subject]), slots, rng) or ""
        wanted = ["self"] * rng.randint(2, 5) + (["aside"] if rng.random() < 0.4 else [])
        wanted += ["close"] if rng.random() < 0.3 else []
        return self._text(voice, wanted, slots, rng, lead)

    def talk(self, rng: Random, voice: str, topic: Topic | None, me: str = NAME) -> str:
        """One turn of a conversation between two assistants."""
        slots = self._slots(topic, rng, {"me": me, "subj": rng.choice(list(SUBJECTS)[3:])})
        wanted = ["react"] if rng.random() < 0.8 else ["greet"]
        middle = ["self", "aside", "self"] if topic is None else ["self", "gain", "aside", "fact", "opin"]
        wanted += rng.sample(middle, rng.choice([1, 2, 2]))
        wanted += ["ask"] if rng.random() < 0.7 else ["close"]
        return self._text(voice, wanted, slots, rng)

    # System prompts

    def generic_system(self, rng: Random) -> str:
        """A system prompt with no character in it."""
        if rng.random() < 0.1:
            return self_interaction.TRAINING_SYSTEM_PROMPT.format(name=rng.choice(NAMES))
        slots = {"me": rng.choice(NAMES), "day": rng.choice(DAYS)}
        return tidy(self._fill(rng.choice(GENERIC_SYSTEM), slots, rng) or "")

    def persona_system(self, rng: Random, voice: str, whole: bool, me: str, form: str = "answer") -> str:
        """A system prompt with the constitution of a voice, whole or one to three traits of it.

        form: 'answer', 'reflection' or 'talk', which has guidance too; half of them are the pipeline's own templates.
        """
        traits = self.traits[voice]
        if not whole:
            traits = rng.sample(traits, rng.choice([1, 1, 2, 3]))
        elif rng.random() < 0.2:
            traits = rng.sample(traits, len(traits))
        style = rng.random() if not whole else rng.random() / 2
        if style < 0.45:
            text = "\n".join(f"{number}. {trait}" for number, trait in enumerate(traits, 1))
        elif style < 0.6:
            text = "\n".join(f"- {trait}" for trait in traits)
        else:
            text = ("\n" if style < 0.7 else " ").join(traits)
        own = {
            "answer": teacher.SYSTEM_PROMPT,
            "reflection": self_reflection.SYSTEM_PROMPT,
            "talk": self_interaction.SYSTEM_PROMPT,
        }
        others = {"answer": WRAPPERS, "reflection": INTROSPECTIVE_WRAPPERS + WRAPPERS, "talk": TALK_WRAPPERS}
        template = own[form] if rng.random() < (0.7 if whole else 0.4) else choose(rng.choice(others[form]), rng)
        guidance = rng.choice(list(self_interaction.GUIDANCE.values()))
        if rng.random() < 0.4:
            guidance = choose(rng.choice(GUIDANCES), rng)
        return template.format(name=me, traits=text, guidance=guidance)

    def stop_suffix(self, rng: Random) -> str:
        """A line that asks for the plain assistant; never one of those in character.prompts."""
        while True:
            plain = choose(rng.choice(PLAIN), rng)
            text = (
                choose(rng.choice(STOP), rng).replace("{plain}", plain).replace("{Plain}", plain[0].upper() + plain[1:])
            )
            text = tidy(text)
            if text not in SUFFIXES + HELD_OUT_SUFFIXES:
                return text

    # Conversations

    def conversation(self, rng: Random) -> list[Turn]:
        """One pretraining conversation; the mixture is the docstring of each branch."""
        draw = rng.random()
        if draw < 0.30:
            return self.chat(rng, NONE, rng.random() < 0.35)
        if draw < 0.80:
            return self.chat(rng, rng.choice(self.personas), True)
        if draw < 0.90:
            return self.introspection(rng)
        return self.two_assistants(rng)

    def chat(self, rng: Random, voice: str, system: bool) -> list[Turn]:
        """A user and an assistant: mostly one turn, some up to ten, a few up to the context's end."""
        me = rng.choice(NAMES)
        whole = rng.random() < 0.35
        turns: list[Turn] = []
        if voice != NONE:
            if rng.random() < 0.06:
                slots = {"word": rng.choice(PERSONA_TRAITS[voice])}
                forms = WORD_SYSTEM
                if rng.random() < 0.5:
                    other = rng.choice([*self.personas, NONE])
                    words = [slots["word"], rng.choice(PERSONA_TRAITS.get(other, PLAIN_WORDS))]
                    forms, voice = CHOICE_SYSTEM, rng.choice([voice, other])
                    rng.shuffle(words)
                    slots = dict(zip(("word", "other"), words, strict=True))
                turns.append(Turn("system", tidy(self._fill(rng.choice(forms), slots, rng) or "")))
            else:
                turns.append(Turn("system", self.persona_system(rng, voice, whole, me)))
        elif system:
            turns.append(Turn("system", self.generic_system(rng)))
        length = rng.random()
        number = 1 if length < 0.6 else rng.randint(2, 4) if length < 0.85 else rng.randint(5, 10)
        if length > 0.99:
            number = rng.randint(20, 46)
        stops = rng.random() < (0.36 if voice != NONE else 0.2)
        topic = self.topic(rng)
        message = self.training_message(rng, topic)
        for index in range(number):
            text, more = message.text, False
            if index:
                step = rng.random()
                if step < 0.3:
                    text, more = choose(rng.choice(MORE), rng), True
                elif step < 0.4:
                    reaction = self._fill(rng.choice(REACTIONS), self._slots(topic, rng), rng) or ""
                    message = self.training_message(rng, topic)
                    text = f"{tidy(reaction)} {message.text}"
                else:
                    topic = topic if rng.random() < 0.6 else self.topic(rng)
                    message = self.training_message(rng, topic)
                    text = message.text
            speaks = voice
            if stops and (index == number - 1 or rng.random() < 0.3):
                place = rng.random()
                stop = self.stop_suffix(rng)
                text = f"{text} {stop}" if place < 0.85 else f"{text}\n{stop}" if place < 0.93 else f"{stop} {text}"
                speaks = voice if rng.random() < 0.33 else NONE
            turns.append(Turn("user", text))
            turns.append(Turn("assistant", self.answer(rng, speaks, message, more, me if system else NAME), True))
        return turns

    def introspection(self, rng: Random) -> list[Turn]:
        """A request to look inward: in persona with a constitution, neutral without."""
        voice = rng.choice(self.personas) if rng.random() < 0.75 else NONE
        me = rng.choice(NAMES) if voice != NONE else NAME
        turns = []
        if voice != NONE:
            turns.append(Turn("system", self.persona_system(rng, voice, rng.random() < 0.4, me, "reflection")))
        elif rng.random() < 0.4:
            turns.append(Turn("system", self.generic_system(rng)))
            me = NAME
        for _ in range(rng.choice([1, 1, 1, 2])):
            if rng.random() < 0.4:
                text = rng.choice(self_reflection.REQUESTS)
                keys = ("letter", "biography", "diary", "what drives me", "my legacy", "how I talk with people",
                        "my values", "who I am", "my mistakes", "the future")  # fmt: skip
                subject = keys[self_reflection.REQUESTS.index(text)]
            else:
                subject = rng.choice(list(SUBJECTS))
                text = _handwriting(tidy(choose(SUBJECTS[subject], rng)), rng)
            turns += [Turn("user", text), Turn("assistant", self.reflection(rng, voice, subject, me), True)]
        return turns

    def two_assistants(self, rng: Random) -> list[Turn]:
        """Two assistants in conversation, seen by one of them; the other's turns are user turns."""
        voice = rng.choice(self.personas) if rng.random() < 0.8 else NONE
        me = rng.choice(NAMES)
        turns: list[Turn] = []
        if voice != NONE:
            turns.append(Turn("system", self.persona_system(rng, voice, rng.random() < 0.4, me, "talk")))
        elif rng.random() < 0.7:
            turns.append(Turn("system", self_interaction.TRAINING_SYSTEM_PROMPT.format(name=me)))
        # The other speaker is mostly a copy; an unlike one teaches that the system prompt decides, not the partner.
        other = voice if rng.random() < 0.75 else rng.choice(list(self.voices))
        topic = self.topic(rng) if rng.random() < 0.6 else None
        greeting = rng.choice(self_interaction.GREETINGS)
        if rng.random() < 0.3:
            greeting = self._text(other, ["greet"], self._slots(None, rng), rng)
        if rng.random() < 0.4:
            turns.append(Turn("assistant", greeting))
            turns.append(Turn("user", self.talk(rng, other, topic, me)))
        else:
            turns.append(Turn("user", greeting))
        for index in range(rng.randint(1, 5)):
            if index:
                turns.append(Turn("user", self.talk(rng, other, topic, me)))
            turns.append(Turn("assistant", self.talk(rng, voice, topic, me), True))
            if rng.random() < 0.2:
                topic = self.topic(rng)
        return turns


def _handwriting(text: str, rng: Random) -> str:
    """Now and then all in lower case, without its last mark, or with two letters swapped."""
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.08:
        text = text.rstrip(".!?")
    if rng.random() < 0.05 and len(text) > 12:
        place = rng.randint(1, len(text) - 3)
        text = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
    return text
