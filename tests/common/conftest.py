from tests.helpers.outputs import place as place
