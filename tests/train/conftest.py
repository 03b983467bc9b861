from tests.helpers.runs import place as place
from tests.helpers.runs import resnet_place as resnet_place
