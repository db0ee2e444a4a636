"""English words for the synthetic tasks, so that they need no download.

RULER draws its own from the ``wonderwords`` package. No word here is part of another, so that a substring score is not
met by accident.
"""

from __future__ import annotations

__all__ = ["ADJECTIVES", "NOUNS"]

_ADJECTIVES = """
ancient arctic ashen bashful blunt bold brave brief bright brisk broad bronze calm candid careful cheerful chilly
civic clean clever cloudy coarse cosmic cozy crimson crisp curious curly damp daring deep dense distant dizzy dreamy
drowsy dusty eager earnest eastern elastic elegant empty faint fancy fearless fertile fierce flat fluffy foggy fond
formal fragile frank fresh frosty frugal gentle giant gifted gleaming glossy golden graceful grand grateful gritty
hardy harsh hasty hazy hidden hollow honest humble humid idle jagged jolly jovial keen kind large lavish lazy legal
lively local lonely loyal lucid lucky lunar mellow merry mighty mild misty modest muddy murky narrow nimble noble
noisy northern novel oblong odd olive orderly pale patient plain playful pleasant polite proud prudent purple quaint
quick quiet radiant rapid rare ready rigid robust rough round royal rugged rustic sandy scarlet secret serene shallow
sharp shiny silent silky simple sincere sleepy slender slim slow smooth snug sober soft solar solemn solid sour spicy
spiral spotless square stable steady steep sticky stiff stormy sturdy subtle sudden sunny swift tall tame tender tepid
thirsty thrifty tidy timid tiny tranquil trusty upbeat urban useful vague valid vast velvet violet vivid warm wary
western whole wicked wild wise witty wooden woolly yellow young zealous
"""

_NOUNS = """
acorn airport album almond anchor ankle apple apron arena armchair artist atlas attic autumn avenue badge bakery
balcony bamboo banana banner barrel basin basket battery beacon beaver bedroom beetle bicycle biscuit blanket blossom
boulder bracket branch breeze bridge broker bucket buffalo builder bullet bundle burger butter button cabbage cabin
cactus camera candle canoe canvas canyon captain caravan carbon carpet carrot castle cattle cellar cement century
ceramic chamber channel chapel charcoal cherry chimney chisel chorus cinema circle citizen clerk climate clinic clock
closet clover coach cobalt coffee collar colony column comet compass copper coral corner cottage cotton counter
courier cradle crater cricket crystal cupboard curtain cushion dairy dancer desert diamond dinner dolphin donkey
doorway dragon drawer driver drummer eclipse editor elbow emerald engine envelope estuary fabric factory falcon farmer
feather fender ferry fiddle finger flute folder forest fortress fossil fountain freezer funnel furnace galaxy gallery
garage garden garlic gazelle geyser ginger giraffe glacier goblet gondola gopher gorilla grammar granite grape gravel
guitar hammer hammock harbor harvest hazel helmet hermit heron hockey honey horizon hostel hunter igloo insect island
ivory jacket jaguar jasmine jersey jewel jigsaw journal jungle juniper kennel kernel kettle kidney kitchen kitten
ladder lagoon lantern laundry lawyer leather lemon leopard lettuce library lighter lizard lobster locket magnet
mammoth mansion marble market marsh meadow medal melon merchant meteor mirror missile mitten monarch monkey morning
mosaic muffin museum mushroom mustard napkin necklace needle nephew nickel notebook nugget nutmeg oasis ocean octopus
office onion orbit orchard orchid organ ostrich otter outpost oven oyster paddle painter palace panda panther papaya
parcel parrot pastry pasture patrol peanut pebble pelican pencil pepper petal phantom piano pickle pigeon pillow pilot
pioneer pirate planet plaster platform plumber pocket poem polymer poplar portrait potato poultry prairie printer
prison puddle pulley pumpkin puppet puzzle pyramid quarry quartz quiver rabbit raccoon radar radish railway rainbow
ranger raven recipe reptile ribbon rifle ritual robin rocket rooster rudder saddle safari sailor salad salmon sandal
satchel saucer sausage scholar school scooter seagull season sermon shadow shelter sheriff shovel signal silver singer
siren sketch skillet slipper soldier sparrow spider spinach splinter sponge squirrel stadium statue stove student
subway suitcase sulfur sultan summit surgeon swallow sweater symbol syrup tailor talent tavern teacher temple tennis
theater thicket thimble thunder ticket timber tissue tobacco tomato tractor trader treaty tribune trumpet tulip tunnel
turbine turkey turtle umbrella uncle unicorn vacuum valley vanilla vehicle vendor village vineyard violin visitor
volcano voyage wagon waiter wallet walnut walrus warden weasel weaver wedding whisker whistle widow willow window
winter wizard wolf workshop yogurt zebra zeppelin
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
