"""The built-in corpus: a small grammar of English, Italian and German, with gold word alignments.

A sentence is generated from its meaning (a `Clause`), which each language's grammar turns into words. The corpus
covers gender and number agreement, conjugation, dropped subject pronouns and adjectives after the noun in Italian;
case endings, the verb in second position and the infinitive at the end in German; negation and questions in all
three languages. Every word carries the *role* it plays in the meaning, such as `verb` or `object.noun`. Words of two
languages with the same role are aligned.

Every validation and test sentence contains a held-out pairing (a verb with its object, or an adjective with its
noun) that occurs in no training sentence, while each of its words does. A model that only memorizes training sentences
therefore cannot translate them.
"""

import random
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

LANGUAGES = ("en", "it", "de")
SPLIT_SIZES = {"train": 24_000, "validation": 1_000, "test": 1_000}  # sentence pairs

# ---------------------------------------------------------------------------- the lexicon
# Columns are separated by |, the forms of a word by spaces; _ is a space within a form.

# English | Italian, gender | German, gender | kind. A third German form is the accusative singular.
NOUN_TABLE = """
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

# English | Italian: masculine and feminine singular, then plural | German stem | kinds of nouns it describes
ADJECTIVE_TABLE = """
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

# English | Italian infinitive, io tu lui noi loro | German infinitive, ich du er | kinds of objects
VERB_TABLE = """
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

# English: base form, third person, and both negated | Italian and German as in VERB_TABLE
MODAL_TABLE = """
can can cannot cannot | potere posso puoi può possiamo possono | können kann kannst kann
want_to wants_to do_not_want_to does_not_want_to | volere voglio vuoi vuole vogliamo vogliono | wollen will willst will
have_to has_to do_not_have_to does_not_have_to | dovere devo devi deve dobbiamo devono | müssen muss musst muss
should should should_not should_not | dovere dovrei dovresti dovrebbe dovremmo dovrebbero | sollen sollte solltest sollte
"""

TIME_TABLE = """
today | oggi | heute
tomorrow | domani | morgen
now | adesso | jetzt
every_day | ogni_giorno | jeden_Tag
this_evening | stasera | heute_Abend
in_the_morning | di_mattina | am_Morgen
"""

ANIMAL_VERBS = {"eat", "drink", "see", "find", "look_for", "love", "hear", "carry", "sleep", "swim", "work"}

# Subject pronouns are numbered 0 to 5: I, you, he, she, we, they. Italian drops them.
SUBJECT_PRONOUNS = {"en": ("I", "you", "he", "she", "we", "they"), "de": ("ich", "du", "er", "sie", "wir", "sie")}
# Verbs have forms for five persons: I; you; he, she or a singular noun; we; they or a plural noun.
PERSON_OF_PRONOUN = (0, 1, 2, 2, 3, 4)
THIRD_SINGULAR, THIRD_PLURAL = 2, 4
# Object pronouns are numbered 0 to 2: him, her, them.
OBJECT_PRONOUNS = {"en": ("him", "her", "them"), "it": ("lo", "la", "li"), "de": ("ihn", "sie", "sie")}
# Italian forms as in ADJECTIVE_TABLE, German stem.
POSSESSIVES = {
    "my": ("mio mia miei mie", "mein"),
    "your": ("tuo tua tuoi tue", "dein"),
    "our": ("nostro nostra nostri nostre", "unser"),
}
TO_BE = {"en": "am are is are are", "it": "sono sei è siamo sono", "de": "bin bist ist sind sind"}  # by person


class Noun(NamedTuple):
    """One noun: its singular and plural, its genders, and the kind of thing it denotes."""

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
    kinds: tuple[str, ...] = ()  # of objects; empty: intransitive or modal


class Adjective(NamedTuple):
    """One adjective. Italian: masculine and feminine singular, then plural."""

    en: str
    it: tuple[str, ...]
    de: str
    kinds: tuple[str, ...]  # of nouns it describes


class Expression(NamedTuple):
    """A question word or time expression in each language."""

    en: str
    it: str
    de: str


def _parse_table(table: str) -> list[list[list[str]]]:
    """A list of rows; each is a list of cells, each a list of words."""
    return [[cell.split() for cell in line.split("|")] for line in table.strip().splitlines()]


def _noun(en, it, de, kind) -> Noun:
    accusative = de[2] if len(de) == 4 else de[0]
    return Noun(tuple(en), tuple(it[:2]), it[2], tuple(de[:2]), accusative, de[-1], kind[0])


def _verb(en, it, de, kinds=()) -> Verb:
    plural = de[1] + "n" if de[1] == "sollte" else de[0]  # with wir and sie, the form is that of the infinitive
    return Verb(tuple(en), tuple(it), (*de, plural, plural), tuple(kinds))


NOUNS = [_noun(*row) for row in _parse_table(NOUN_TABLE)]
ADJECTIVES = [Adjective(en[0], tuple(it), de[0], tuple(kinds)) for en, it, de, kinds in _parse_table(ADJECTIVE_TABLE)]
VERBS = [_verb(*row) for row in _parse_table(VERB_TABLE)]
MODALS = [_verb(*row) for row in _parse_table(MODAL_TABLE)]
TIMES = [Expression(*(cell[0] for cell in row)) for row in _parse_table(TIME_TABLE)]
QUESTION_WORDS = {
    "what": Expression("what", "che_cosa", "was"),
    "why": Expression("why", "perché", "warum"),
    "when": Expression("when", "quando", "wann"),
}

# ---------------------------------------------------------------------------- the meaning of a sentence

Pairing = tuple[str, str]  # (verb, object noun) or (adjective, noun), by their English base forms


class NounPhrase(NamedTuple):
    noun: Noun
    plural: bool
    determiner: str  # one of: a the this two some my your our
    adjective: Adjective | None

    @property
    def person(self) -> int:
        return THIRD_PLURAL if self.plural else THIRD_SINGULAR


@dataclass(frozen=True)
class Clause:
    """The meaning of one sentence. A pronoun is given by its number in SUBJECT_PRONOUNS or OBJECT_PRONOUNS."""

    subject: int | NounPhrase
    verb: Verb | None = None  # None: a form of *to be*, followed by `predicate`
    object: int | NounPhrase | None = None
    predicate: Adjective | None = None
    modal: Verb | None = None
    time: Expression | None = None
    time_first: bool = False
    negated: bool = False
    question: str = ""  # "", "yes/no", "what", "why" or "when"
    punctuated: bool = True

    @property
    def person(self) -> int:
        return PERSON_OF_PRONOUN[self.subject] if isinstance(self.subject, int) else self.subject.person

    def pairings(self) -> set[Pairing]:
        """The pairings that occur in this sentence, held out or not."""
        phrases = [p for p in (self.subject, self.object) if isinstance(p, NounPhrase)]
        found = {(p.adjective.en, p.noun.en[0]) for p in phrases if p.adjective}
        if isinstance(self.object, NounPhrase):
            found.add((self.verb.en[0], self.object.noun.en[0]))
        if self.predicate and isinstance(self.subject, NounPhrase):
            found.add((self.predicate.en, self.subject.noun.en[0]))
        return found


# ---------------------------------------------------------------------------- from meaning to words
# Each function returns words with the roles they play: [(word, "role role"), ...].

RoleWords = list[tuple[str, str]]


def _with_role(phrase: str, role: str) -> RoleWords:
    """Splits a form of the lexicon at its underscores and gives every word the role."""
    return [(word, role) for word in phrase.split("_")]


def _english_phrase(phrase: NounPhrase | int, role: str) -> RoleWords:
    if isinstance(phrase, int):
        return [((SUBJECT_PRONOUNS if role == "subject" else OBJECT_PRONOUNS)["en"][phrase], role)]
    adjective = [(phrase.adjective.en, f"{role}.adjective")] if phrase.adjective else []
    words = [*adjective, (phrase.noun.en[phrase.plural], f"{role}.noun")]
    determiner, next_letter = phrase.determiner, words[0][0][0]
    if determiner == "a" and next_letter in "aeiou":
        determiner = "an"
    if determiner == "this" and phrase.plural:
        determiner = "these"
    return [(determiner, f"{role}.determiner"), *words]


def english(clause: Clause) -> RoleWords:
    """Subject, verb, object, with *do* in questions and negations."""
    third_person = clause.person == THIRD_SINGULAR
    do = "does" if third_person else "do"
    subject = _english_phrase(clause.subject, "subject")
    negation = [("not", "negation")] if clause.negated else []
    # In a question the subject comes between `before` and `after`; otherwise it precedes both.
    if clause.verb is None:
        before = [(TO_BE["en"].split()[clause.person], "be")]
        after = [*negation, (clause.predicate.en, "predicate")]
    elif clause.modal:
        before, after = _english_modal(clause, do)
        after = after + _with_role(clause.verb.en[0], "verb")
    elif clause.question or clause.negated:
        before, after = [(do, "verb")], negation + _with_role(clause.verb.en[0], "verb")
    else:
        before, after = [], _with_role(clause.verb.en[third_person], "verb")
    core = before + subject + after if clause.question else subject + before + after
    if clause.object is not None:
        core = core + _english_phrase(clause.object, "object")
    return _complete(core, clause, "en")


def _english_modal(clause: Clause, do: str) -> tuple[RoleWords, RoleWords]:
    """The words of the modal that precede the subject of a question, and the others."""
    base, third_person, *negated = clause.modal.en
    forms = negated if clause.negated else (base, third_person)
    roles = {"cannot": "modal negation", "not": "negation"}
    words = forms[clause.person == THIRD_SINGULAR].split("_")
    modal = [(word, roles.get(word, "modal")) for word in words]
    if not clause.question:
        return modal, []
    if words[-1] == "to":  # want to: do you want to …?
        return [(do, "modal")], _with_role(base, "modal")
    return modal[:1], modal[1:]


def _italian_article(determiner: str, next_word: str, gender: str, plural: bool) -> str:
    """The form of a determiner before a word: lo zaino, l'uomo, gli amici, un'arancia."""
    vowel = next_word[0] in "aeiou"
    takes_lo = gender == "m" and re.match(r"z|s[^aeiou]", next_word) is not None
    if determiner == "the":
        if plural:
            return "le" if gender == "f" else "gli" if vowel or takes_lo else "i"
        return "l'" if vowel else "la" if gender == "f" else "lo" if takes_lo else "il"
    if determiner == "a":
        return ("un'" if vowel else "una") if gender == "f" else "uno" if takes_lo else "un"
    ending = {"m": "oi", "f": "ae"}[gender][plural]
    if determiner == "this":
        return "quest'" if vowel and not plural else "quest" + ending
    return {"two": "due", "some": "alcun" + ending}[determiner]


def _italian_form(gender: str, plural: bool) -> int:
    """The index of the form of an adjective that agrees in gender and number."""
    return (gender == "f") + 2 * plural


def _italian_phrase(phrase: NounPhrase, role: str) -> RoleWords:
    noun, gender = phrase.noun.it[phrase.plural], phrase.noun.it_gender
    form = _italian_form(gender, phrase.plural)
    if phrase.determiner in POSSESSIVES:  # il mio libro
        possessive = POSSESSIVES[phrase.determiner][0].split()[form]
        determiner = f"{_italian_article('the', possessive, gender, phrase.plural)} {possessive}"
    else:
        determiner = _italian_article(phrase.determiner, noun, gender, phrase.plural)
    words = [(word, f"{role}.determiner") for word in determiner.replace("'", " '").split()]
    words.append((noun, f"{role}.noun"))
    return words + ([(phrase.adjective.it[form], f"{role}.adjective")] if phrase.adjective else [])


def italian(clause: Clause) -> RoleWords:
    """Subject pronouns are dropped; the finite verb then carries the subject's role too."""
    dropped = isinstance(clause.subject, int)
    subject = [] if dropped else _italian_phrase(clause.subject, "subject")
    also_subject = " subject" if dropped else ""
    person = clause.person
    core = [("non", "negation")] if clause.negated else []
    if isinstance(clause.object, int):  # an object pronoun precedes the finite verb: lo vedo
        core.append((OBJECT_PRONOUNS["it"][clause.object], "object"))
    if clause.verb is None:
        # Of the subject pronouns only he, she and they occur with an adjective.
        gender = {2: "m", 3: "f", 5: "m"}[clause.subject] if dropped else clause.subject.noun.it_gender
        form = _italian_form(gender, person == THIRD_PLURAL)
        core.append((TO_BE["it"].split()[person], "be" + also_subject))
        core.append((clause.predicate.it[form], "predicate" + also_subject))
    elif clause.modal:
        core += [(clause.modal.it[1 + person], "modal" + also_subject), (clause.verb.it[0], "verb")]
    else:
        core.append((clause.verb.it[1 + person], "verb" + also_subject))
    if isinstance(clause.object, NounPhrase):
        core += _italian_phrase(clause.object, "object")
    return _complete(core + subject if clause.question in ("what", "when") else subject + core, clause, "it")


_GERMAN_ENDINGS = {  # of der and dieser, by gender, "p" for plural: nominative, accusative
    "m": ("er", "en"),
    "f": ("e", "e"),
    "n": ("es", "es"),
    "p": ("e", "e"),
}


def _german_phrase(phrase: NounPhrase | int, role: str, negated: bool = False) -> RoleWords:
    accusative = role == "object"
    if isinstance(phrase, int):
        return [((OBJECT_PRONOUNS if accusative else SUBJECT_PRONOUNS)["de"][phrase], role)]
    gender = "p" if phrase.plural else phrase.noun.de_gender
    strong = _GERMAN_ENDINGS[gender][accusative]
    weak = "en" if gender == "p" or strong == "en" else "e"
    determiner_role = f"{role}.determiner"
    if phrase.determiner == "the":
        determiner, ending = {"er": "der", "en": "den", "e": "die", "es": "das"}[strong], weak
    elif phrase.determiner == "this":
        determiner, ending = "dies" + strong, weak
    elif phrase.determiner in ("two", "some"):
        determiner, ending = {"two": "zwei", "some": "einige"}[phrase.determiner], "e"
    else:  # ein and mein have no ending in some cases; the adjective then takes the strong ending
        stem = "ein" if phrase.determiner == "a" else POSSESSIVES[phrase.determiner][1]
        if negated and stem == "ein":
            stem, determiner_role = "kein", f"{determiner_role} negation"
        no_ending = strong in ("er", "es")
        determiner, ending = (stem, strong) if no_ending else (stem + strong, weak)
    words = [(determiner, determiner_role)]
    if phrase.adjective:
        words.append((phrase.adjective.de.removesuffix("e") + ending, f"{role}.adjective"))
    singular = phrase.noun.de_accusative if accusative else phrase.noun.de[0]
    return [*words, (phrase.noun.de[1] if phrase.plural else singular, f"{role}.noun")]


def german(clause: Clause) -> RoleWords:
    """The finite verb comes second (first in yes/no questions), the infinitive last."""
    subject, person = _german_phrase(clause.subject, "subject"), clause.person
    pronoun = _german_phrase(clause.object, "object") if isinstance(clause.object, int) else []
    has_noun_object = isinstance(clause.object, NounPhrase)
    noun_object = _german_phrase(clause.object, "object", clause.negated) if has_noun_object else []
    uses_kein = has_noun_object and clause.negated and clause.object.determiner == "a"
    negation = [("nicht", "negation")] if clause.negated and not uses_kein else []
    time = _with_role(clause.time.de, "time") if clause.time and not clause.time_first else []
    if clause.verb is None:
        finite, last = (TO_BE["de"].split()[person], "be"), [(clause.predicate.de, "predicate")]
    elif clause.modal:
        finite, last = (clause.modal.de[1 + person], "modal"), [(clause.verb.de[0], "verb")]
    else:
        finite, last = (clause.verb.de[1 + person], "verb"), []
    inverted = clause.question or (clause.time and clause.time_first)
    front = [finite, *subject] if inverted else [*subject, finite]
    return _complete(front + pronoun + time + noun_object + negation + last, clause, "de")


def _complete(core: RoleWords, clause: Clause, lang: str) -> RoleWords:
    """Adds the question word, the time expression and the punctuation mark, and capitalizes the first letter."""
    if clause.question in QUESTION_WORDS:
        core = _with_role(getattr(QUESTION_WORDS[clause.question], lang), "question") + core
    if clause.time:
        time = _with_role(getattr(clause.time, lang), "time")
        if clause.time_first:
            core = time + core
        elif lang != "de":  # `german` has already put the time inside the clause
            core = core + time
    if clause.punctuated:
        core = [*core, ("?" if clause.question else ".", "end")]
    (first, role), *rest = core
    return [(first[0].upper() + first[1:], role), *rest]


_GRAMMARS = {"en": english, "it": italian, "de": german}


def _detokenize(words: RoleWords) -> str:
    text = " ".join(word for word, _ in words)
    return re.sub(r" ([.?])", r"\1", text).replace(" ' ", "'")


def tokens_of(text: str) -> list[str]:
    """The words and punctuation marks of a sentence. Alignments are positions in this list."""
    return re.findall(r"\w+|[^\w\s]+", text)


# ---------------------------------------------------------------------------- sentence pairs


class Pair(NamedTuple):
    """A sentence pair and its (source, target) links, positions in `tokens_of` each text.

    `alignment` links all words that share a role. `sure`, a subset, holds the unambiguous links (Och and Ney, 2003):
    those of a target word's first role, where only one source word has that role.
    """

    src_text: str
    tgt_text: str
    alignment: frozenset[tuple[int, int]]
    sure: frozenset[tuple[int, int]]


def make_pair(clause: Clause, lang_src: str, lang_tgt: str) -> Pair:
    """The clause in both languages, with words that share a role aligned."""
    source, target = _GRAMMARS[lang_src](clause), _GRAMMARS[lang_tgt](clause)
    positions: dict[str, list[int]] = {}  # source positions by role
    for i, (_, source_roles) in enumerate(source):
        for role in source_roles.split():
            positions.setdefault(role, []).append(i)
    alignment, sure = set(), set()
    for j, (_, target_roles) in enumerate(target):
        for rank, role in enumerate(target_roles.split()):
            links = {(i, j) for i in positions.get(role, ())}
            alignment |= links
            if rank == 0 and len(links) == 1:
                sure |= links
    return Pair(_detokenize(source), _detokenize(target), frozenset(alignment), frozenset(sure))


# ---------------------------------------------------------------------------- random clauses


@cache
def _nouns(kinds: tuple[str, ...]) -> list[Noun]:
    return [noun for noun in NOUNS if noun.kind in kinds]


@cache
def _adjectives(kind: str) -> list[Adjective]:
    return [adjective for adjective in ADJECTIVES if kind in adjective.kinds]


@cache
def _verbs(of_animals: bool) -> list[Verb]:
    return [verb for verb in VERBS if verb.en[0] in ANIMAL_VERBS or not of_animals]


def _random_noun_phrase(rng: random.Random, kinds: tuple[str, ...], negated: bool = False) -> NounPhrase:
    noun = rng.choice(_nouns(kinds))
    plural = rng.random() < 0.35
    determiners = ["the", "the", "this", "my", "your", "our"] + ([] if plural else ["a", "a", "a"])
    if plural and not negated:
        determiners += ["two", "some"]
    adjective = rng.choice(_adjectives(noun.kind)) if rng.random() < 0.45 else None
    return NounPhrase(noun, plural, rng.choice(determiners), adjective)


def _random_clause(rng: random.Random) -> Clause:
    negated = rng.random() < 0.2
    pronoun = rng.random() < 0.5
    animate = ("person", "person", "animal")
    subject = rng.randrange(6) if pronoun else _random_noun_phrase(rng, (rng.choice(animate),))
    time = rng.choice(TIMES) if rng.random() < 0.35 else None
    question = rng.choice(["yes/no", "yes/no", "what", "why", "when"]) if rng.random() < 0.25 else ""
    clause = Clause(
        subject,
        time=time if question != "when" else None,
        time_first=rng.random() < 0.4 and not question,
        negated=negated and not question,
        question=question,
        punctuated=rng.random() < 0.9,
    )
    if rng.random() < 0.15:
        return _with_predicate(clause, rng)
    return _with_verb(clause, rng)


def _with_predicate(clause: Clause, rng: random.Random) -> Clause:
    """Turns the clause into one with *to be* and an adjective, such as: the apple is red."""
    if isinstance(clause.subject, int):
        subject, kind = rng.choice((2, 3, 5)), "person"  # he, she, they
    else:
        subject = _random_noun_phrase(rng, tuple({noun.kind for noun in NOUNS}))._replace(adjective=None)
        kind = subject.noun.kind
    predicate = rng.choice(_adjectives(kind))
    question = clause.question and "yes/no"
    return replace(clause, subject=subject, predicate=predicate, question=question, time=None, time_first=False)


def _with_verb(clause: Clause, rng: random.Random) -> Clause:
    """Adds a verb and, where they apply, a modal and an object."""
    pronoun, question, negated = isinstance(clause.subject, int), clause.question, clause.negated
    animal = not pronoun and clause.subject.noun.kind == "animal"
    verb = rng.choice(_verbs(animal))
    modal = rng.choice(MODALS) if rng.random() < 0.4 else None
    if question == "what" and verb.kinds in ((), ("person",)):  # such verbs have no object that "what" asks for
        question = "why"
    if question == "when" and verb.kinds and not pronoun:  # Italian would have two noun phrases after the verb
        question = "why"
    if modal and modal.en[0] == "have_to":  # "non deve" means "must not", not "does not have to"
        negated = False
    obj = None
    if verb.kinds and question != "what":
        obj = _random_noun_phrase(rng, verb.kinds, negated)
        if obj.noun.kind == "person" and rng.random() < 0.3:
            obj = rng.randrange(len(OBJECT_PRONOUNS["en"]))
    return replace(clause, verb=verb, modal=modal, object=obj, question=question, negated=negated)


# ---------------------------------------------------------------------------- the corpus


def _held_out_pairings(rng: random.Random) -> dict[Pairing, str]:
    """The split that each held-out pairing belongs to: 5% of all pairings to validation, 5% to test."""
    pairings = [(v.en[0], n.en[0]) for v in VERBS for n in NOUNS if n.kind in v.kinds]
    pairings += [(a.en, n.en[0]) for a in ADJECTIVES for n in NOUNS if n.kind in a.kinds]
    rng.shuffle(pairings)
    count = len(pairings) // 20
    return {p: "validation" if i < count else "test" for i, p in enumerate(pairings[: 2 * count])}


@cache
def _generate_splits(lang_src: str, lang_tgt: str, seed: int) -> dict[str, tuple[Pair, ...]]:
    """All three splits. Training is generated first, because the others may use only its words."""
    rng = random.Random(seed)
    split_of = _held_out_pairings(rng)
    seen, training_words, splits = set(), set(), {}
    for split, size in SPLIT_SIZES.items():
        allowed = set() if split == "train" else {split}
        pairs = []
        while len(pairs) < size:
            clause = _random_clause(rng)
            if {split_of[pairing] for pairing in clause.pairings() if pairing in split_of} != allowed:
                continue
            pair = make_pair(clause, lang_src, lang_tgt)
            words = set(tokens_of(pair.src_text) + tokens_of(pair.tgt_text))
            if pair.src_text in seen or (split != "train" and not words <= training_words):
                continue
            seen.add(pair.src_text)
            if split == "train":
                training_words |= words
            pairs.append(pair)
        splits[split] = tuple(pairs)
    return splits


def toy_pairs(lang_src: str, lang_tgt: str, split: str, seed: int = 0) -> tuple[Pair, ...]:
    """The pairs of one split. No source sentence occurs twice, within a split or across splits.

    `lang_src` and `lang_tgt` are two of LANGUAGES, `split` is a key of SPLIT_SIZES.
    """
    return _generate_splits(lang_src, lang_tgt, seed)[split]
