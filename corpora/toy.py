"""The embedded corpus: a small grammar of English, Italian and German, with gold word alignments.

A sentence starts as a meaning (`Clause`), and each language says it by its own rules, so there is
something to learn: gender and number agreement, conjugation, dropped pronouns and adjectives after
the noun in Italian; case endings, the verb in second place and the infinitive at the end in German;
negation and questions in all three. Words that say the same part of the meaning carry the same
*role*, and the gold alignment follows from the roles.

Validation and test sentences each hold a pairing (verb with object, or adjective with noun) that no
training sentence has, while every single word does occur in training: memory does not help.
"""

import random
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

LANGUAGES = ("en", "it", "de")
SPLIT_SIZES = {"train": 24_000, "validation": 1_000, "test": 1_000}

# ---------------------------------------------------------------------------- the lexicon

# English | Italian, gender | German, gender | kind. A third German form is the accusative singular.
NOUNS = """
man men | uomo uomini m | Mann Männer m | person
woman women | donna donne f | Frau Frauen f | person
child children | bambino bambini m | Kind Kinder n | person
girl girls | ragazza ragazze f | Mädchen Mädchen n | person
boy boys | ragazzo ragazzi m | Junge Jungen Jungen m | person
teacher teachers | maestro maestri m | Lehrer Lehrer m | person
doctor doctors | medico medici m | Arzt Ärzte m | person
friend friends | amico amici m | Freund Freunde m | person
student students | studente studenti m | Schüler Schüler m | person
singer singers | cantante cantanti f | Sängerin Sängerinnen f | person
dog dogs | cane cani m | Hund Hunde m | animal
cat cats | gatto gatti m | Katze Katzen f | animal
bird birds | uccello uccelli m | Vogel Vögel m | animal
horse horses | cavallo cavalli m | Pferd Pferde n | animal
apple apples | mela mele f | Apfel Äpfel m | food
orange oranges | arancia arance f | Orange Orangen f | food
pear pears | pera pere f | Birne Birnen f | food
cake cakes | torta torte f | Kuchen Kuchen m | food
potato potatoes | patata patate f | Kartoffel Kartoffeln f | food
tomato tomatoes | pomodoro pomodori m | Tomate Tomaten f | food
onion onions | cipolla cipolle f | Zwiebel Zwiebeln f | food
sandwich sandwiches | panino panini m | Brötchen Brötchen n | food
salad salads | insalata insalate f | Salat Salate m | food
juice juices | succo succhi m | Saft Säfte m | drink
beer beers | birra birre f | Bier Biere n | drink
wine wines | vino vini m | Wein Weine m | drink
tea teas | tè tè m | Tee Tees m | drink
lemonade lemonades | limonata limonate f | Limonade Limonaden f | drink
book books | libro libri m | Buch Bücher n | text
letter letters | lettera lettere f | Brief Briefe m | text
newspaper newspapers | giornale giornali m | Zeitung Zeitungen f | text
story stories | storia storie f | Geschichte Geschichten f | text
poem poems | poesia poesie f | Gedicht Gedichte n | text
house houses | casa case f | Haus Häuser n | opening
door doors | porta porte f | Tür Türen f | opening
window windows | finestra finestre f | Fenster Fenster n | opening
suitcase suitcases | valigia valigie f | Koffer Koffer m | opening
backpack backpacks | zaino zaini m | Rucksack Rucksäcke m | opening
car cars | macchina macchine f | Auto Autos n | thing
table tables | tavolo tavoli m | Tisch Tische m | thing
chair chairs | sedia sedie f | Stuhl Stühle m | thing
mirror mirrors | specchio specchi m | Spiegel Spiegel m | thing
lamp lamps | lampada lampade f | Lampe Lampen f | thing
shirt shirts | camicia camicie f | Hemd Hemden n | thing
hat hats | cappello cappelli m | Hut Hüte m | thing
shoe shoes | scarpa scarpe f | Schuh Schuhe m | thing
umbrella umbrellas | ombrello ombrelli m | Regenschirm Regenschirme m | thing
key keys | chiave chiavi f | Schlüssel Schlüssel m | thing
picture pictures | quadro quadri m | Bild Bilder n | thing
boat boats | barca barche f | Boot Boote n | thing
"""

# English | Italian: masculine and feminine, singular then plural | German stem | kinds described
ADJECTIVES = """
happy | felice felice felici felici | glücklich | person animal
tired | stanco stanca stanchi stanche | müde | person animal
young | giovane giovane giovani giovani | jung | person animal
sick | malato malata malati malate | krank | person animal
strong | forte forte forti forti | stark | person animal drink
famous | famoso famosa famosi famose | berühmt | person text
rich | ricco ricca ricchi ricche | reich | person
kind | gentile gentile gentili gentili | freundlich | person
old | vecchio vecchia vecchi vecchie | alt | person animal text opening thing
small | piccolo piccola piccoli piccole | klein | person animal food opening thing
white | bianco bianca bianchi bianche | weiß | animal drink opening thing
black | nero nera neri nere | schwarz | animal opening thing
red | rosso rossa rossi rosse | rot | food drink opening thing
green | verde verde verdi verdi | grün | food opening thing
blue | blu blu blu blu | blau | opening thing
cold | freddo fredda freddi fredde | kalt | food drink
warm | caldo calda caldi calde | warm | food drink
fresh | fresco fresca freschi fresche | frisch | food drink
sweet | dolce dolce dolci dolci | süß | food drink
new | nuovo nuova nuovi nuove | neu | text opening thing
long | lungo lunga lunghi lunghe | lang | text
sad | triste triste tristi tristi | traurig | person text
heavy | pesante pesante pesanti pesanti | schwer | opening thing
cheap | economico economica economici economiche | billig | food drink thing
"""

# English | Italian infinitive, io tu lui noi loro | German infinitive, ich du er | kinds of object
VERBS = """
eat eats | mangiare mangio mangi mangia mangiamo mangiano | essen esse isst isst | food
cook cooks | cucinare cucino cucini cucina cuciniamo cucinano | kochen koche kochst kocht | food
drink drinks | bere bevo bevi beve beviamo bevono | trinken trinke trinkst trinkt | drink
order orders | ordinare ordino ordini ordina ordiniamo ordinano | bestellen bestelle bestellst bestellt | food drink
read reads | leggere leggo leggi legge leggiamo leggono | lesen lese liest liest | text
write writes | scrivere scrivo scrivi scrive scriviamo scrivono | schreiben schreibe schreibst schreibt | text
see sees | vedere vedo vedi vede vediamo vedono | sehen sehe siehst sieht | person animal food text opening thing
find finds | trovare trovo trovi trova troviamo trovano | finden finde findest findet | person animal text opening thing
look_for looks_for | cercare cerco cerchi cerca cerchiamo cercano | suchen suche suchst sucht | person animal text opening thing
buy buys | comprare compro compri compra compriamo comprano | kaufen kaufe kaufst kauft | food drink text opening thing
sell sells | vendere vendo vendi vende vendiamo vendono | verkaufen verkaufe verkaufst verkauft | food drink text opening thing
love loves | amare amo ami ama amiamo amano | lieben liebe liebst liebt | person animal text
greet greets | salutare saluto saluti saluta salutiamo salutano | grüßen grüße grüßt grüßt | person
hear hears | sentire sento senti sente sentiamo sentono | hören höre hörst hört | person animal
know knows | conoscere conosco conosci conosce conosciamo conoscono | kennen kenne kennst kennt | person text
wash washes | lavare lavo lavi lava laviamo lavano | waschen wasche wäschst wäscht | animal food thing
carry carries | portare porto porti porta portiamo portano | tragen trage trägst trägt | text thing
open opens | aprire apro apri apre apriamo aprono | öffnen öffne öffnest öffnet | opening text
close closes | chiudere chiudo chiudi chiude chiudiamo chiudono | schließen schließe schließt schließt | opening text
paint paints | dipingere dipingo dipingi dipinge dipingiamo dipingono | malen male malst malt | animal food thing opening
clean cleans | pulire pulisco pulisci pulisce puliamo puliscono | putzen putze putzt putzt | opening thing
forget forgets | dimenticare dimentico dimentichi dimentica dimentichiamo dimenticano | vergessen vergesse vergisst vergisst | text thing
sleep sleeps | dormire dormo dormi dorme dormiamo dormono | schlafen schlafe schläfst schläft |
work works | lavorare lavoro lavori lavora lavoriamo lavorano | arbeiten arbeite arbeitest arbeitet |
dance dances | ballare ballo balli balla balliamo ballano | tanzen tanze tanzt tanzt |
swim swims | nuotare nuoto nuoti nuota nuotiamo nuotano | schwimmen schwimme schwimmst schwimmt |
laugh laughs | ridere rido ridi ride ridiamo ridono | lachen lache lachst lacht |
"""

# English: plain, third person, negated plain, negated third person | as in VERBS
MODALS = """
can can cannot cannot | potere posso puoi può possiamo possono | können kann kannst kann
want_to wants_to do_not_want_to does_not_want_to | volere voglio vuoi vuole vogliamo vogliono | wollen will willst will
have_to has_to do_not_have_to does_not_have_to | dovere devo devi deve dobbiamo devono | müssen muss musst muss
should should should_not should_not | dovere dovrei dovresti dovrebbe dovremmo dovrebbero | sollen sollte solltest sollte
"""

TIMES = """
today | oggi | heute
tomorrow | domani | morgen
now | adesso | jetzt
every_day | ogni_giorno | jeden_Tag
this_evening | stasera | heute_Abend
in_the_morning | di_mattina | am_Morgen
"""

ANIMALS_CAN = {"eat", "drink", "see", "find", "look_for", "love", "hear", "carry", "sleep", "swim", "work"}

QUESTION_WORDS = {
    "what": ("what", "che_cosa", "was"),
    "why": ("why", "perché", "warum"),
    "when": ("when", "quando", "wann"),
}

# Subject pronouns by number: I you he she we they. Italian drops them.
PRONOUNS = {"en": ("I", "you", "he", "she", "we", "they"), "de": ("ich", "du", "er", "sie", "wir", "sie")}
PERSON = (0, 1, 2, 2, 3, 4)  # the pronoun's place among the five persons of a conjugation
# Object pronouns: him her them.
OBJECTS = {"en": ("him", "her", "them"), "it": ("lo", "la", "li"), "de": ("ihn", "sie", "sie")}
POSSESSIVES = {
    "my": ("mio mia miei mie", "mein"),
    "your": ("tuo tua tuoi tue", "dein"),
    "our": ("nostro nostra nostri nostre", "unser"),
}
TO_BE = {"en": "am are is are are", "it": "sono sei è siamo sono", "de": "bin bist ist sind sind"}


class Noun(NamedTuple):
    """One noun: (singular, plural) forms, genders, and what kind of thing it names."""

    en: tuple[str, str]
    it: tuple[str, str]
    it_gender: str
    de: tuple[str, str]
    de_accusative: str
    de_gender: str
    kind: str


class Verb(NamedTuple):
    """One verb or modal. Italian and German: the infinitive, then the five persons."""

    en: tuple[str, ...]
    it: tuple[str, ...]
    de: tuple[str, ...]
    kinds: tuple[str, ...] = ()


class Adjective(NamedTuple):
    """One adjective. Italian: masculine and feminine, singular then plural."""

    en: str
    it: tuple[str, ...]
    de: str
    kinds: tuple[str, ...]


def _rows(table: str) -> list[list[list[str]]]:
    return [[cell.split() for cell in line.split("|")] for line in table.strip().splitlines()]


def _noun(en, it, de, kind) -> Noun:
    accusative = de[2] if len(de) == 4 else de[0]
    return Noun(tuple(en), tuple(it[:2]), it[2], tuple(de[:2]), accusative, de[-1], kind[0])


def _verb(en, it, de, kinds=()) -> Verb:
    plural = de[1] + "n" if de[1] == "sollte" else de[0]  # wir and sie: the infinitive's form
    return Verb(tuple(en), tuple(it), (*de, plural, plural), tuple(kinds))


ALL_NOUNS = [_noun(*row) for row in _rows(NOUNS)]
ALL_ADJECTIVES = [Adjective(en[0], tuple(it), de[0], tuple(kinds)) for en, it, de, kinds in _rows(ADJECTIVES)]
ALL_VERBS = [_verb(*row) for row in _rows(VERBS)]
ALL_MODALS = [_verb(*row) for row in _rows(MODALS)]
ALL_TIMES = [tuple(cell[0] for cell in row) for row in _rows(TIMES)]

# ---------------------------------------------------------------------------- the meaning


class NounPhrase(NamedTuple):
    noun: Noun
    plural: bool
    determiner: str  # a the this two some my your our
    adjective: Adjective | None

    @property
    def person(self) -> int:
        return 4 if self.plural else 2


@dataclass(frozen=True)
class Clause:
    """The meaning of one sentence. Pronouns are numbers into PRONOUNS and OBJECTS."""

    subject: int | NounPhrase
    verb: Verb | None = None  # None: the subject *is* `predicate`
    object: int | NounPhrase | None = None
    predicate: Adjective | None = None
    modal: Verb | None = None
    time: tuple[str, str, str] | None = None
    time_first: bool = False
    negated: bool = False
    question: str = ""  # "", "yes/no", "what", "why" or "when"
    punctuated: bool = True

    @property
    def person(self) -> int:
        return PERSON[self.subject] if isinstance(self.subject, int) else self.subject.person

    def pairings(self) -> set[tuple[str, str]]:
        """The (verb, noun) and (adjective, noun) pairings this sentence would teach."""
        phrases = [p for p in (self.subject, self.object) if isinstance(p, NounPhrase)]
        found = {(p.adjective.en, p.noun.en[0]) for p in phrases if p.adjective}
        if isinstance(self.object, NounPhrase):
            found.add((self.verb.en[0], self.object.noun.en[0]))
        if self.predicate and isinstance(self.subject, NounPhrase):
            found.add((self.predicate.en, self.subject.noun.en[0]))
        return found


# ---------------------------------------------------------------------------- three languages
# Each function below returns words with the roles they play: [(word, "role role"), ...].

Words = list[tuple[str, str]]


def _say(phrase: str, role: str) -> Words:
    return [(word, role) for word in phrase.split("_")]


def _english_phrase(phrase: NounPhrase | int, role: str) -> Words:
    if isinstance(phrase, int):
        return [((PRONOUNS if role == "subject" else OBJECTS)["en"][phrase], role)]
    noun = phrase.noun.en[phrase.plural]
    rest = ([(phrase.adjective.en, f"{role}.adjective")] if phrase.adjective else []) + [(noun, f"{role}.noun")]
    determiner = phrase.determiner
    if determiner == "a" and rest[0][0][0] in "aeiou":
        determiner = "an"
    if determiner == "this" and phrase.plural:
        determiner = "these"
    return [(determiner, f"{role}.determiner"), *rest]


def english(clause: Clause) -> Words:
    """Subject, verb, object; *do* in questions and negations."""
    third = clause.person == 2
    subject = _english_phrase(clause.subject, "subject")
    negation = [("not", "negation")] if clause.negated else []
    if clause.verb is None:
        before, after = [(TO_BE["en"].split()[clause.person], "be")], [*negation, (clause.predicate.en, "predicate")]
    elif clause.modal:
        forms = clause.modal.en[2 * clause.negated :][:2]
        modal = [
            (word, "modal negation" if word == "cannot" else "negation" if word == "not" else "modal")
            for word in forms[third].split("_")
        ]
        if clause.question and modal[-1][0] == "to":  # want to: do you want to …?
            before, after = [("does" if third else "do", "modal")], _say(clause.modal.en[0], "modal")
        else:
            before, after = modal[:1], modal[1:]
            if not clause.question:
                before, after = modal, []
        after = after + _say(clause.verb.en[0], "verb")
    elif clause.question or clause.negated:
        before, after = [("does" if third else "do", "verb")], negation + _say(clause.verb.en[0], "verb")
    else:
        before, after = [], _say(clause.verb.en[third], "verb")
    core = before + subject + after if clause.question else subject + before + after
    if clause.object is not None:
        core = core + _english_phrase(clause.object, "object")
    return _frame(core, clause, 0)


def _italian_article(determiner: str, following: str, gender: str, plural: bool) -> str:
    """The form before the following word: lo zaino, l'uomo, gli amici, un'arancia."""
    vowel = following[0] in "aeiou"
    hard = gender == "m" and re.match(r"z|s[^aeiou]", following) is not None
    if determiner == "the":
        if plural:
            return "le" if gender == "f" else "gli" if vowel or hard else "i"
        return "l'" if vowel else "la" if gender == "f" else "lo" if hard else "il"
    if determiner == "a":
        return ("un'" if vowel else "una") if gender == "f" else "uno" if hard else "un"
    if determiner == "this":
        return "quest'" if vowel and not plural else "quest" + {"m": "oi", "f": "ae"}[gender][plural]
    return {"two": "due", "some": "alcun" + {"m": "oi", "f": "ae"}[gender][plural]}[determiner]


def _italian_phrase(phrase: NounPhrase, role: str) -> Words:
    noun, gender = phrase.noun.it[phrase.plural], phrase.noun.it_gender
    form = (gender == "f") + 2 * phrase.plural
    if phrase.determiner in POSSESSIVES:  # il mio libro
        article = _italian_article("the", "m", gender, phrase.plural)
        determiner = f"{article} {POSSESSIVES[phrase.determiner][0].split()[form]}"
    else:
        determiner = _italian_article(phrase.determiner, noun, gender, phrase.plural)
    words = [(word, f"{role}.determiner") for word in determiner.replace("'", " '").split()]
    words.append((noun, f"{role}.noun"))
    return words + ([(phrase.adjective.it[form], f"{role}.adjective")] if phrase.adjective else [])


def italian(clause: Clause) -> Words:
    """Pronoun subjects are dropped, so the finite verb carries the subject's role too."""
    dropped = isinstance(clause.subject, int)
    subject = [] if dropped else _italian_phrase(clause.subject, "subject")
    finite_role = " subject" if dropped else ""
    person = clause.person
    core = [("non", "negation")] if clause.negated else []
    if isinstance(clause.object, int):  # the pronoun goes before the finite verb: lo vedo
        core.append((OBJECTS["it"][clause.object], "object"))
    if clause.verb is None:
        gender = ({2: "m", 3: "f", 5: "m"}[clause.subject]) if dropped else clause.subject.noun.it_gender
        core.append((TO_BE["it"].split()[person], "be" + finite_role))
        core.append((clause.predicate.it[(gender == "f") + 2 * (person == 4)], "predicate" + finite_role))
    elif clause.modal:
        core += [(clause.modal.it[1 + person], "modal" + finite_role), (clause.verb.it[0], "verb")]
    else:
        core.append((clause.verb.it[1 + person], "verb" + finite_role))
    if isinstance(clause.object, NounPhrase):
        core += _italian_phrase(clause.object, "object")
    return _frame(core + subject if clause.question in ("what", "when") else subject + core, clause, 1)


_GERMAN_ENDINGS = {  # of der and dieser, by gender or plural: nominative, accusative
    "m": ("er", "en"),
    "f": ("e", "e"),
    "n": ("es", "es"),
    "p": ("e", "e"),
}


def _german_phrase(phrase: NounPhrase | int, role: str, negated: bool = False) -> Words:
    accusative = role == "object"
    if isinstance(phrase, int):
        return [((OBJECTS if accusative else PRONOUNS)["de"][phrase], role)]
    gender = "p" if phrase.plural else phrase.noun.de_gender
    strong = _GERMAN_ENDINGS[gender][accusative]
    determiner_role, weak = f"{role}.determiner", "en" if gender == "p" or strong == "en" else "e"
    if phrase.determiner == "the":
        determiner, ending = {"er": "der", "en": "den", "e": "die", "es": "das"}[strong], weak
    elif phrase.determiner == "this":
        determiner, ending = "dies" + strong, weak
    elif phrase.determiner in ("two", "some"):
        determiner, ending = {"two": "zwei", "some": "einige"}[phrase.determiner], "e"
    else:  # ein, mein: no ending where the adjective then shows the gender
        stem = "ein" if phrase.determiner == "a" else POSSESSIVES[phrase.determiner][1]
        if negated and stem == "ein":
            stem, determiner_role = "kein", f"{determiner_role} negation"
        bare = strong in ("er", "es")
        determiner, ending = (stem, strong) if bare else (stem + strong, weak)
    words = [(determiner, determiner_role)]
    if phrase.adjective:
        words.append((phrase.adjective.de.removesuffix("e") + ending, f"{role}.adjective"))
    singular = phrase.noun.de_accusative if accusative else phrase.noun.de[0]
    return [*words, (phrase.noun.de[1] if phrase.plural else singular, f"{role}.noun")]


def german(clause: Clause) -> Words:
    """The finite verb stands second (first in yes/no questions), the infinitive last."""
    subject, person = _german_phrase(clause.subject, "subject"), clause.person
    pronoun = _german_phrase(clause.object, "object") if isinstance(clause.object, int) else []
    phrase = isinstance(clause.object, NounPhrase)
    obj = _german_phrase(clause.object, "object", clause.negated) if phrase else []
    kein = phrase and clause.negated and clause.object.determiner == "a"
    negation = [("nicht", "negation")] if clause.negated and not kein else []
    time = _say(clause.time[2], "time") if clause.time and not clause.time_first else []
    if clause.verb is None:
        finite, last = (TO_BE["de"].split()[person], "be"), [(clause.predicate.de, "predicate")]
    elif clause.modal:
        finite, last = (clause.modal.de[1 + person], "modal"), [(clause.verb.de[0], "verb")]
    else:
        finite, last = (clause.verb.de[1 + person], "verb"), []
    inverted = clause.question or (clause.time and clause.time_first)
    front = [finite, *subject] if inverted else [*subject, finite]
    return _frame(front + pronoun + time + obj + negation + last, clause, 2)


def _frame(core: Words, clause: Clause, language: int) -> Words:
    """Puts the question word, the time and the full stop around the core; capital letter first."""
    if clause.question in QUESTION_WORDS:
        core = _say(QUESTION_WORDS[clause.question][language], "question") + core
    if clause.time:
        time = _say(clause.time[language], "time")
        if clause.time_first:
            core = time + core
        elif LANGUAGES[language] != "de":  # German puts a late time inside the clause
            core = core + time
    if clause.punctuated:
        core = [*core, ("?" if clause.question else ".", "end")]
    (first, role), *rest = core
    return [(first[0].upper() + first[1:], role), *rest]


_SAY = {"en": english, "it": italian, "de": german}


def tokens_of(text: str) -> list[str]:
    """The words of a sentence, punctuation apart: what alignments count."""
    return re.findall(r"\w+|[^\w\s]+", text)


def _join(words: Words) -> str:
    text = " ".join(word for word, _ in words)
    return re.sub(r" ([.?])", r"\1", text).replace(" ' ", "'")


# ---------------------------------------------------------------------------- the corpus


class Pair(NamedTuple):
    """A sentence pair with (source, target) links between positions in `tokens_of` each text.

    `alignment` links every two words that share a role. `sure` (Och and Ney, 2003) is the part with
    one possible reading: the target word's first role, where a single source word plays it.
    """

    src_text: str
    tgt_text: str
    alignment: frozenset[tuple[int, int]]
    sure: frozenset[tuple[int, int]]


def make_pair(clause: Clause, lang_src: str, lang_tgt: str) -> Pair:
    """Says the clause in both languages and aligns the words that share a role."""
    source, target = _SAY[lang_src](clause), _SAY[lang_tgt](clause)
    alignment, sure = set(), set()
    for j, (_, roles) in enumerate(target):
        for place, role in enumerate(roles.split()):
            speakers = [i for i, (_, source_roles) in enumerate(source) if role in source_roles.split()]
            alignment |= {(i, j) for i in speakers}
            if place == 0 and len(speakers) == 1:
                sure.add((speakers[0], j))
    return Pair(_join(source), _join(target), frozenset(alignment), frozenset(sure))


def _random_phrase(rng: random.Random, kinds: tuple[str, ...], negated: bool) -> NounPhrase:
    noun = rng.choice([noun for noun in ALL_NOUNS if noun.kind in kinds])
    plural = rng.random() < 0.35
    choices = ["the", "the", "this", "my", "your", "our"] + ([] if plural else ["a", "a", "a"])
    if plural and not negated:
        choices += ["two", "some"]
    adjective = rng.choice([a for a in ALL_ADJECTIVES if noun.kind in a.kinds]) if rng.random() < 0.45 else None
    return NounPhrase(noun, plural, rng.choice(choices), adjective)


def _random_clause(rng: random.Random) -> Clause:
    negated = rng.random() < 0.2
    animate = ("person", "person", "animal")
    person = rng.random() < 0.5
    subject = rng.randrange(6) if person else _random_phrase(rng, (rng.choice(animate),), False)
    time = rng.choice(ALL_TIMES) if rng.random() < 0.35 else None
    question = rng.choice(["yes/no", "yes/no", "what", "why", "when"]) if rng.random() < 0.25 else ""
    clause = Clause(
        subject,
        time=time if question != "when" else None,
        time_first=rng.random() < 0.4 and not question,
        negated=negated and not question,
        question=question,
        punctuated=rng.random() < 0.9,
    )
    if rng.random() < 0.15:  # the apple is red
        subject = rng.choice((2, 3, 5)) if person else _random_phrase(rng, tuple({n.kind for n in ALL_NOUNS}), False)
        kind = "person" if person else subject.noun.kind
        predicate = rng.choice([a for a in ALL_ADJECTIVES if kind in a.kinds])
        if not person:
            subject = subject._replace(adjective=None)
        question = question and "yes/no"
        return replace(clause, subject=subject, predicate=predicate, question=question, time=None, time_first=False)
    animal = not person and subject.noun.kind == "animal"
    verb = rng.choice([v for v in ALL_VERBS if v.en[0] in ANIMALS_CAN or not animal])
    modal = rng.choice(ALL_MODALS) if rng.random() < 0.4 else None
    if question == "what" and verb.kinds in ((), ("person",)):  # nothing to ask for, or whom
        question = "why"
    if question == "when" and verb.kinds and not person:  # Italian would have two nouns after the verb
        question = "why"
    if modal and modal.en[0] == "have_to":  # non deve is must not, rather than need not
        clause = replace(clause, negated=False)
    obj = None
    if verb.kinds and question != "what":
        obj = _random_phrase(rng, verb.kinds, clause.negated)
        if obj.noun.kind == "person" and rng.random() < 0.3:
            obj = rng.randrange(3)
    return replace(clause, verb=verb, modal=modal, object=obj, question=question)


def _held_out(rng: random.Random) -> dict[tuple[str, str], str]:
    """Which split owns each held-out pairing: one in twenty to validation, one in twenty to test."""
    pairings = [(v.en[0], n.en[0]) for v in ALL_VERBS for n in ALL_NOUNS if n.kind in v.kinds]
    pairings += [(a.en, n.en[0]) for a in ALL_ADJECTIVES for n in ALL_NOUNS if n.kind in a.kinds]
    rng.shuffle(pairings)
    count = len(pairings) // 20
    return {p: "validation" if i < count else "test" for i, p in enumerate(pairings[: 2 * count])}


@cache
def _corpus(lang_src: str, lang_tgt: str, seed: int) -> dict[str, tuple[Pair, ...]]:
    """All three splits. Training comes first, so that the others can be kept to its words."""
    rng = random.Random(seed)
    owner = _held_out(rng)
    seen, known, splits = set(), set(), {}
    for split, size in SPLIT_SIZES.items():
        pairs = []
        while len(pairs) < size:
            clause = _random_clause(rng)
            if {owner.get(pairing, "train") for pairing in clause.pairings()} - {"train"} != {split} - {"train"}:
                continue
            pair = make_pair(clause, lang_src, lang_tgt)
            words = set(tokens_of(pair.src_text) + tokens_of(pair.tgt_text))
            if pair.src_text in seen or (split != "train" and not words <= known):
                continue
            seen.add(pair.src_text)
            if split == "train":
                known |= words
            pairs.append(pair)
        splits[split] = tuple(pairs)
    return splits


def toy_pairs(lang_src: str, lang_tgt: str, split: str, seed: int = 0) -> tuple[Pair, ...]:
    """The pairs of one split, all different on the source side, within and across the splits.

    `lang_src` and `lang_tgt` are two of LANGUAGES, `split` a key of SPLIT_SIZES.
    """
    return _corpus(lang_src, lang_tgt, seed)[split]
