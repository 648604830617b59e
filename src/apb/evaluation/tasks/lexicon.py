"""Word lists of the generated tasks: lower-case English words, disjoint between the lists."""

NOUNS: tuple[str, ...] = tuple(
    """
    anchor apple apron arch arrow attic axe badge bag baker ball banner barn barrel basin basket bath bean bear bed bee
    bell belt bench bike bird blade blanket board boat bone book boot bottle bowl box branch bread brick bridge broom
    brush bucket builder bull bus butcher butter button cabin cable cage cake camel camera candle cannon canoe cap
    captain car card carpet cart castle cat cellar chain chair chalk cheese chest chimney church circle clerk clock
    cloth cloud coach coat coffee coin collar comb cook copper corn cottage cotton cow cradle crane crown cup curtain
    dancer desk diary dish doctor dog doll donkey door dove dragon drawer dress driver drum duck eagle egg elbow
    elephant engine envelope eye factory falcon fan farmer feather fence ferry fiddle field finger fire fish flag flame
    flask flower flute fly fork fort fountain fox frame frog fruit furnace garden gate ghost giant gift glass globe
    glove goat goose grape guard guitar hammer hand harp hat hawk heart hedge helmet hen hill hook horn horse hotel
    house hunter ink inn iron island jacket jar jewel judge jug juice kettle key king kitchen kite knife knight ladder
    lady lake lamb lamp lantern leaf lemon letter lever lid lighter lion lizard lock log loom lorry machine magnet
    mail map mask mast mat meal medal mill miner mirror monk monkey moon motor mouse mule museum nail neck needle nest
    net newspaper notebook nurse oak oar onion orange orchard organ oven owl ox oyster page paint painter pan panther
    paper parcel parrot path pear pen pencil penny piano picture pie pig pigeon pillow pilot pipe pirate plane plank
    plate plough plum pocket poet pond pony porter poster pot potato prince printer prison pump puppet purse queen
    rabbit radio raft rail rake rat raven razor ribbon rice rider rifle ring river road robe rock roof room root rope
    rose rug ruler saddle sail sailor salt sand school scissors screw seal seat seed shark sheep sheet shelf shell
    shield ship shirt shoe shop shovel sign singer sink skirt sled snake soap sock soldier spade spear spider spoon
    stable stage stair star statue stick stone stool stove straw string sugar suit sword table tailor tank tea teacher
    temple tent theater thread throne ticket tiger tile toast toe tool torch tower toy train tray tree truck trumpet
    tunnel turkey turtle umbrella uncle vase vest vessel village violin wagon waiter wall wallet watch water wheel
    whistle widow window wing wire witch wizard wolf wool worker worm yard
    """.split()
)

ADJECTIVES: tuple[str, ...] = tuple(
    """
    able active aged amber ancient angry bare big bitter black blank blind blue blunt bold brave brief bright brisk
    broad broken brown busy calm careful cheap chief chilly clean clear clever close cloudy cold common cool costly
    crazy crisp cruel curious curly daily damp dark dear deep dim dirty double dry dull dusty eager early easy eastern
    elder empty even faint fair false famous fancy fast fat few fierce final fine firm flat foreign formal fragile
    free fresh friendly full funny gentle glad golden good grand gray great greedy green happy hard harsh heavy hidden
    high hollow holy honest hot huge humble hungry idle inner jolly keen kind large last late lazy lean light little
    lively lonely long loose loud low loyal lucky mad main merry mild modern modest muddy naked narrow neat new nice
    noble noisy northern odd old open outer pale patient plain polite poor pretty proud public pure purple quick quiet
    rapid rare raw ready real red rich right ripe rough round royal rude rural rusty sad safe salty scarlet secret
    shallow sharp shiny short shy silent silver simple single slow small smart smooth soft solid sour southern
    steady steep sticky stiff still strange strict strong sunny sweet swift tall tame tender thick thin tidy tight tiny
    tired tough true upper urban usual vast warm weak wealthy western wet white whole wide wild wise wooden
    yellow young
    """.split()
)

VERBS: tuple[str, ...] = tuple(
    """
    admired answered asked blamed borrowed bought brought built buried called carried caught changed chased checked
    chose cleaned climbed closed collected copied counted covered crossed described dragged drew dropped entered
    examined feared fetched filled finished fixed followed forgot found gathered greeted grew guarded guided heard held
    helped hid ignored inspected invited joined kept kicked knew left lifted liked loaded locked lost loved made marked
    measured mended met missed moved named needed noticed obeyed offered opened ordered packed painted passed patched
    planned praised promised pulled pushed raised reached read received remembered repaired returned saved saw searched
    sent served shared showed sold stole stored studied taught thanked threw tied told took touched traded trusted
    turned used valued visited wanted warned washed watched weighed welcomed wrapped
    """.split()
)

NAMES: tuple[str, ...] = tuple(
    """
    adam agnes alan albert alice amy andrew anna anthony arthur barbara ben bertha betty brian bruno carl carol
    catherine charles clara claire daniel david diana edgar edith edward elena eliza ella emil emily emma eric ernest
    esther eva felix flora frances frank fred george gloria grace greta hannah harold harry helen henry hugo ida irene
    isabel ivan jacob jane jason jean joan john joseph julia karl kate kevin laura leo leon lewis lily linda louis lucy
    luke marco margaret maria martha martin mary max michael miriam nancy nina nora oliver olga oscar otto paula peter
    philip rachel ralph richard rita robert roger rosa ruth samuel sarah simon sofia stella stephen susan teresa thomas
    tina victor walter
    """.split()
)

PLACES: tuple[str, ...] = tuple(
    """
    abbey airport alley bakery bank bay beach border canal capital cave cemetery chapel city clinic coast college corner
    county court dock farm forest garage hall harbor highway hospital junction laboratory library lighthouse market
    marsh meadow mine monastery mountain office palace park plaza port quarry ranch shore square station street suburb
    tavern town university valley warehouse wharf woods
    """.split()
)

# Reserved words: names of variables and of chapters. No other list contains them, so filler never does.
TITLES: tuple[str, ...] = tuple(
    """
    acorn agate alder algae almond anvil ash aspen atlas aurora badger bamboo basil beacon beaver birch bison blossom
    bramble breeze bronze cactus canyon caramel carbon cedar cherry cinder cinnamon citrus clover cobalt cobra comet
    coral cosmos cricket crystal cypress daisy dawn delta desert diamond dolphin dusk echo eclipse elm ember emerald
    fable fern fiord flint fossil frost galaxy garlic garnet gecko geyser ginger glacier granite gravel grove gull
    harvest hazel heather heron hickory honey horizon indigo ivory ivy jade jaguar jasmine jungle juniper kelp lagoon
    lark lava lavender lilac linen lotus lynx magma mango maple marble marlin meteor mint mist monsoon mosaic moss
    nebula nectar nickel oasis ocean olive onyx opal orbit orchid otter papaya pearl pebble pepper phoenix pine pixel
    planet pollen poppy prairie prism puma quartz quill rain rainbow reef ridge robin ruby rye saffron sage salmon
    sapphire satin sequoia shadow shale silk slate sleet snow solstice sparrow spruce squid storm summit sunset swan
    tango tempest thistle thorn thunder tide timber topaz tulip tundra twilight vanilla velvet violet volcano walnut
    walrus wasp wheat willow winter wren yarrow zebra zenith zephyr zinc
    """.split()
)

WORDS: tuple[str, ...] = NOUNS + ADJECTIVES + VERBS + PLACES
"""All common words (names and titles excluded), from which word soup, word lists and Zipf texts are drawn."""
