from tests.helpers.pictures import model as model
