/*-------------------------------------------------------------------------
 *
 * registry.c
 *		Which providers there are, and whether options suit them.
 *
 * A few providers are built in; shared libraries add others by calling
 * agentvm_register_provider() from their _PG_init.  The libraries named in
 * agentvm.provider_libraries are loaded when a name is asked for that is not
 * known yet.  One that fails to load is a warning and takes no other provider
 * with it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "nodes/pg_list.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/varlena.h"

#include "agentvm.h"
#include "db.h"
#include "providers/options.h"
#include "providers/provider.h"

#define MAX_PROVIDERS 32
#define MAX_PROVIDER_NAME 32
#define SHOWN_NAME 64 /* bytes of an unknown name that an error repeats */

static const Provider *providers[MAX_PROVIDERS] = {&noop_provider, &ec2_provider};
static int nproviders = 2;

/* The value of agentvm.provider_libraries that has been acted on; NULL: none yet. */
static char *loaded_libraries = NULL;

static const Provider *
find_known(const char *name)
{
	int i;

	for (i = 0; i < nproviders; i++)
	{
		if (strcmp(providers[i]->name, name) == 0)
			return providers[i];
	}
	return NULL;
}

static bool
is_provider_name(const char *name)
{
	size_t len = strlen(name);

	return len > 0 && len <= MAX_PROVIDER_NAME &&
		   strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_-") == len;
}

void
agentvm_register_provider(const Provider *provider)
{
	const Provider *known;

	/* The first member is all that may be read of a struct of another version. */
	if (provider->abi != AVM_PROVIDER_ABI)
		ereport(
			ERROR, errcode(AVM_INVALID_CONFIGURATION),
			errmsg("provider was built for version %d of the provider interface", provider->abi),
			errdetail("This server's agentvm has version %d.", AVM_PROVIDER_ABI),
			errhint("Build the provider's library again."), hide_caller());
	if (provider->name == NULL || !is_provider_name(provider->name))
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("a provider's name must be 1 to %d lower-case letters, digits, underscores "
					   "or hyphens",
					   MAX_PROVIDER_NAME),
				hide_caller());
	if (provider->options == NULL || provider->secrets == NULL || provider->step == NULL ||
		(provider->placed && provider->perform == NULL))
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("provider \"%s\" is incomplete", provider->name), hide_caller());

	known = find_known(provider->name);
	if (known == provider)
		return;
	if (known != NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("there is already a provider \"%s\"", provider->name), hide_caller());
	if (nproviders == MAX_PROVIDERS)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("there are already %d providers", MAX_PROVIDERS), hide_caller());

	providers[nproviders++] = provider;
}

/*
 * Load one library; a failure is only a warning.  No subtransaction is needed:
 * loading takes no lock, and what the library's _PG_init may leave half done
 * lives in this process, where an abort would not undo it either.
 */
static void
load_library(const char *library)
{
	MemoryContext context = CurrentMemoryContext;

	PG_TRY();
	{
		load_file(library, false);
	}
	PG_CATCH();
	{
		ErrorData *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		ereport(WARNING, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("could not load library \"%s\" of agentvm.provider_libraries: %s", library,
					   error->message),
				hide_caller());
		FreeErrorData(error);
	}
	PG_END_TRY();
}

/* Load what the setting names, once for each value that it takes. */
static void
load_libraries(void)
{
	const char *setting = avm_provider_libraries ? avm_provider_libraries : "";
	char *copy;
	char *list;
	List *libraries = NIL;
	ListCell *cell;

	if (loaded_libraries != NULL && strcmp(loaded_libraries, setting) == 0)
		return;

	copy = MemoryContextStrdup(TopMemoryContext, setting);
	if (loaded_libraries != NULL)
		pfree(loaded_libraries);
	loaded_libraries = copy;

	list = pstrdup(setting);
	if (!SplitDirectoriesString(list, ',', &libraries))
	{
		ereport(WARNING, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("agentvm.provider_libraries is not a list of libraries"), hide_caller());
		libraries = NIL;
	}
	foreach (cell, libraries)
		load_library((const char *) lfirst(cell));

	list_free_deep(libraries);
	pfree(list);
}

const Provider *
provider_find(const char *name)
{
	const Provider *provider = find_known(name);

	if (provider == NULL)
	{
		load_libraries();
		provider = find_known(name);
	}
	return provider;
}

List *
provider_names_listing(bool placed)
{
	List *names = NIL;

	load_libraries();
	for (int i = 0; i < nproviders; i++)
	{
		if (providers[i]->lists && providers[i]->placed == placed)
			names = lappend(names, unconstify(char *, providers[i]->name));
	}
	return names;
}

/* What an error may repeat of a name that somebody has made up. */
static char *
shown_name(const char *name, int len)
{
	return pnstrdup(name, pg_mbcliplen(name, len, SHOWN_NAME));
}

const Provider *
provider_get(const char *name)
{
	const Provider *provider = provider_find(name);
	StringInfoData known;
	int i;

	if (provider != NULL)
		return provider;

	initStringInfo(&known);
	for (i = 0; i < nproviders; i++)
		appendStringInfo(&known, "%s%s", i > 0 ? ", " : "", providers[i]->name);
	ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
			errmsg("unknown provider \"%s\"", shown_name(name, strlen(name))),
			errhint("Known providers: %s.", known.data), hide_caller());
	return NULL;
}

static const ProviderOption *
find_option(const Provider *provider, const JsonbValue *key)
{
	const ProviderOption *option;

	for (option = provider->options; option->name != NULL; option++)
	{
		if (strlen(option->name) == key->val.string.len &&
			memcmp(option->name, key->val.string.val, key->val.string.len) == 0)
			return option;
	}
	return NULL;
}

static char *
known_options(const Provider *provider, OptionScope scope)
{
	const ProviderOption *option;
	StringInfoData names;

	initStringInfo(&names);
	for (option = provider->options; option->name != NULL; option++)
	{
		if (scope != OPTIONS_CALLER || option->caller)
			appendStringInfo(&names, "%s%s", names.len > 0 ? ", " : "", option->name);
	}
	return names.len > 0 ? names.data : pstrdup("none");
}

/* A list of strings; a single string stands for a list of one. */
static bool
is_string_list(const JsonbValue *value)
{
	int i;
	int n;

	if (value->type == jbvString)
		return true;
	if (value->type != jbvBinary || !JsonContainerIsArray(value->val.binary.data))
		return false;

	n = JsonContainerSize(value->val.binary.data);
	for (i = 0; i < n; i++)
	{
		if (getIthJsonbValueFromContainer(value->val.binary.data, i)->type != jbvString)
			return false;
	}
	return true;
}

/* Whether the value is of an option's type; if not, *expected says what that is. */
static bool
has_type(char type, const JsonbValue *value, const char **expected)
{
	int64 number;

	switch (type)
	{
		case 's':
			*expected = "a string";
			return value->type == jbvString;
		case 'b':
			*expected = "true or false";
			return value->type == jbvBool;
		case 'i':
			*expected = "an integer";
			return integer_from_json(value, &number) && number >= PG_INT32_MIN &&
				   number <= PG_INT32_MAX;
		case 'd':
			*expected = "a duration";
			return duration_from_json(value, &number);
		case 'l':
			*expected = "a list of strings";
			return is_string_list(value);
		default:
			elog(ERROR, "unexpected type of option: %d", type);
	}
	return false;
}

static void
check_option(const Provider *provider, OptionScope scope, const JsonbValue *key,
			 const JsonbValue *value)
{
	const ProviderOption *option = find_option(provider, key);
	const char *expected = NULL;

	if (option == NULL)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("unknown option \"%s\" for provider \"%s\"",
					   shown_name(key->val.string.val, key->val.string.len), provider->name),
				errhint("Known options: %s.", known_options(provider, scope)), hide_caller());
	if (scope == OPTIONS_CALLER && !option->caller)
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("option \"%s\" of provider \"%s\" is not for callers to set", option->name,
					   provider->name),
				errdetail("Only an administrator can set it, for a team or in a profile."),
				errhint("Known options: %s.", known_options(provider, scope)), hide_caller());
	if (!has_type(option->type, value, &expected))
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("option \"%s\" of provider \"%s\" must be %s", option->name, provider->name,
					   expected),
				option->type == 'd' ? errhint("%s", DURATION_HINT) : 0, hide_caller());
}

void
provider_check_options(const Provider *provider, OptionScope scope, Jsonb *options)
{
	JsonbIterator *iterator;
	JsonbIteratorToken token;
	JsonbValue key;
	JsonbValue value;

	if (!JB_ROOT_IS_OBJECT(options))
		ereport(ERROR, errcode(AVM_INVALID_CONFIGURATION),
				errmsg("options for provider \"%s\" must be a JSON object", provider->name),
				hide_caller());

	iterator = JsonbIteratorInit(&options->root);
	while ((token = JsonbIteratorNext(&iterator, &key, true)) != WJB_DONE)
	{
		if (token != WJB_KEY)
			continue;
		(void) JsonbIteratorNext(&iterator, &value, true);
		check_option(provider, scope, &key, &value);
	}

	if (provider->validate != NULL)
		provider->validate(scope, options);
}

Jsonb *
provider_merge_options(const Provider *provider, Jsonb *below, Jsonb *above)
{
	if (above == NULL || JB_ROOT_COUNT(above) == 0)
		return below != NULL ? below : above;
	if (below == NULL)
		return above;

	for (int i = 0; provider->alternatives != NULL && provider->alternatives[i][0] != NULL; i++)
	{
		for (int k = 0; k < 2; k++)
		{
			if (option_value(above, provider->alternatives[i][k]) != NULL)
				below = handle_set_text(below, provider->alternatives[i][1 - k], NULL);
		}
	}
	return DatumGetJsonbP(
		DirectFunctionCall2(jsonb_concat, JsonbPGetDatum(below), JsonbPGetDatum(above)));
}
