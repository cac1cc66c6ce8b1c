/*-------------------------------------------------------------------------
 *
 * ec2.h
 *		What the files of the provider "ec2" share; ec2.c has the theory of operation.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROVIDERS_EC2_H
#define AGENTVM_PROVIDERS_EC2_H

#include "agentvm.h"

#include "net/aws.h"
#include "net/xml.h"
#include "providers/boot.h"
#include "providers/provider.h"

#define EC2_VERSION "2016-11-15"
#define STS_VERSION "2011-06-15"

#define RUN "RunInstances"
#define DESCRIBE "DescribeInstances"
#define TERMINATE "TerminateInstances"
#define STOP "StopInstances"
#define START "StartInstances"
#define CANCEL "CancelSpotInstanceRequests"
#define DESCRIBE_BY_FILTER "DescribeInstances by filter" /* which is granted by itself */
#define PUT_PARAMETER "PutParameter"
#define DELETE_PARAMETER "DeleteParameter"
#define MAX_USER_DATA 16384 /* bytes before base64 */

#define SPOT "spot"
#define ON_DEMAND "on-demand"
#define PERSISTENT "persistent"
#define SPOT_TAG "agentvm-spot"			  /* of an instance: what its request is, if persistent */
#define INTERRUPTED "Server.SpotInstance" /* how the reason begins for which AWS has stopped one */
#define SSM "ssm"						  /* a way of secret_delivery */
#define NOT_FOUND_CODE "InvalidInstanceID.NotFound"
#define NO_REQUEST_CODE "InvalidSpotInstanceRequestID.NotFound"
#define MISMATCH_CODE "IdempotentParameterMismatch"
#define ENDED_CODE "IdempotentInstanceTerminated"

#define LOWER "abcdefghijklmnopqrstuvwxyz"
#define DIGITS "0123456789"

/* What the handle holds; zero and NULL are left out of it. */
typedef struct Ec2Progress
{
	int64 attempt;	/* launch attempts begun */
	int64 launched; /* epoch ms at which RunInstances was answered */
	int64 wait;		/* last STEP_WAIT, ms */
	int64 looks;	/* fruitless looks for an instance */
	int64 look_at;	/* epoch ms at which the last look-up by tag was sent */
	const char *
		phase; /* of OP_TERMINATE: NULL, CONFIRM_PHASE, REFUSED_PHASE, "lookup", "parameter", and see ec2_spot.c; of
				* OP_PROVISION: NULL, PUT_PHASE, FIND_PHASE; of the others: see ec2_power.c */
	const char *vm_id;
	const char *region;
	const char *request; /* persistent one of the instance, see ec2_spot.c */
	int64 cancelled;	 /* it is, or has expired */
	int64 request_until; /* epoch s at which it expires, 0: not known */

	/* the launch attempt that is under way */
	int64 type;	   /* index into the instance types */
	int64 subnet;  /* index into subnet_ids */
	int64 sends;   /* how often it may have been sent and not been answered */
	int64 sent_at; /* epoch ms of the last time, 0: settled */
	int64 open_at; /* the same without the send that is under way, if one is */
	int64 again;   /* attempts begun because a token was of no use */
	const char *market;
	const char *form; /* the encoded form, without UserData */
	BootPlan boot;	  /* what its user data is made of */

	/* with secret_delivery = 'ssm' */
	const char *parameter; /* it is there, or may be; kept as AVM_BOOT_LEFT */
	int64 put;			   /* the attempt whose payload it has, 0: none */
	int64 puts;			   /* how often another one may have been sent since */
	int64 put_at;		   /* epoch ms of the last one that may still be on its way, 0: none */
	int64 put_open;		   /* the same without the one that is under way, if one is */

	int64
		power_sent; /* how often a stop or start may have been sent, 0: settled; kept as AVM_POWER_SENT */
} Ec2Progress;

/* One step of one operation. */
typedef struct Ec2Step
{
	const ProviderContext *context;
	const ProviderSession *session;
	const HttpReply *reply;
	XmlDoc *doc; /* what ec2_parse() has made of the reply */
	ProviderStep *out;
	Ec2Progress progress;
	int64 now; /* epoch ms */
} Ec2Step;

/* Where a launch is asked for. */
typedef struct Ec2Place
{
	const char *market; /* SPOT or ON_DEMAND */
	const char *type;	/* of instance */
	const char *subnet; /* "": one of the default VPC's */
} Ec2Place;

/* What a search for the instance of a launch has come to. */
typedef enum Ec2Search
{
	SEARCH_GOES_ON, /* or has failed: the step has ended */
	SEARCH_FOUND,	/* the answer, step->doc, has it */
	SEARCH_IN_VAIN	/* there is none, and none can appear any more */
} Ec2Search;

/* ---- ec2.c: shared by all operations ---- */

/* The region of the session's VM, or of the one to be; of OP_LIST and OP_REAP. */
extern const char *ec2_region(Ec2Step *step);

/* The step's request: this form. */
extern void ec2_send(Ec2Step *step, const char *service, const char *action, AwsForm *form);
extern void ec2_send_describe(Ec2Step *step, const char *vm_id);

/* A filter of that number for DescribeInstances: those that have not ended. */
extern void ec2_add_living(AwsForm *form, int filter);

/*
 * What the account grants of the step's request; "id": it is made for that instance or spot
 * request, or for several.
 */
extern void ec2_limit(Ec2Step *step, const char *operation, const char *id);

/* Tell the engine whose account it is that has answered. */
extern void ec2_learn_account(Ec2Step *step, XmlDoc *doc);

/* What calls are signed with; NULL as long as that is not known. */
extern const SecretSet *ec2_signer(const Ec2Step *step);

/* Ends of a step. */
extern void ec2_note_error(Ec2Step *step, const AwsError *error);
extern void ec2_fail(Ec2Step *step, ErrorClass class, const char *code, const char *message);
extern void ec2_fail_malformed(Ec2Step *step);

/* Wait for a time that doubles from "first" to "last" ms, but not beyond "until" (0: no bound). */
extern void ec2_wait(Ec2Step *step, int first, int last, int64 until);

#define CONFIRM_PHASE "confirm" /* Ec2Progress.phase: was the instance ended? */
#define REFUSED_PHASE "refused" /* the same after a refusal for want of rights */

/* A series of looks begins, unless it is under way. */
extern void ec2_enter_phase(Ec2Progress *progress, const char *phase);

/* The step waits for the next look, but not beyond "until" (epoch ms, 0: no bound). */
extern void ec2_look_later(Ec2Step *step, const char *phase, int64 until);

/*
 * One more look in a row has not found what has to be there, if AWS has got that far:
 * whether another one is worth it, for which the step then waits.
 */
extern bool ec2_look_again(Ec2Step *step, const char *phase);

/* The reply as a document, or NULL if it is none; freed when the step ends. */
extern XmlDoc *ec2_parse(Ec2Step *step);

/* Hand the address of the first instance in an answer to the engine; returns its state or NULL. */
extern char *ec2_learn_instance(Ec2Step *step, XmlDoc *doc);

/*
 * Look, by the session's tag, for a live instance of a launch that may have happened: a
 * step of that, as often as it takes, for as long as the handle's phase is "phase".
 */
extern Ec2Search ec2_search(Ec2Step *step, const char *phase);

/* Take over the id of the first instance in an answer, and what market it is of. */
extern void ec2_learn_id(Ec2Step *step, XmlDoc *doc);

/* Forget the launch attempt: it is settled. */
extern void ec2_settle_launch(Ec2Progress *progress);

/* A member of the result: the text at a path, if there is one. */
extern void ec2_add_result(Ec2Step *step, XmlDoc *doc, const char *name, const char *path);

/* Raise AV010. */
pg_noreturn extern void ec2_bad_option(const char *name, const char *value, const char *hint);

/* Forms of text. */
extern bool ec2_is_id(const char *text, const char *prefix);
extern bool ec2_is_made_of(const char *text, const char *characters, size_t max_len);

extern void ec2_validate(OptionScope scope, Jsonb *options);

/* ---- ec2_joint.c: Provider.join and Provider.split ---- */

extern HttpRequest *ec2_join(const HttpRequest *request, const char *const *members, int count);
extern ErrorClass ec2_split(const HttpReply *reply, const char *const *members, int count,
							HttpReply **replies);

/* ---- ec2_launch.c ---- */

#define FIND_PHASE                                                                                 \
	"find" /* Ec2Progress.phase as long as it is not known what a token has launched */

/* The first place in which a launch with these options is tried; points into them. */
extern Ec2Place ec2_first_place(Jsonb *options);

/*
 * A form for RunInstances in a place, for a client token (NULL: none); a persistent spot
 * request expires at "until" (epoch s, 0: nobody says).
 */
extern void ec2_run_form(AwsForm *form, const ProviderSession *session, Jsonb *options,
						 const Ec2Place *place, const char *token, int64 until);

/* Raise AV010 or AV012 for what would keep the user data of a session from being made. */
extern void ec2_check_launch(Jsonb *options, bool runtime);

extern void ec2_provision(Ec2Step *step);

/* ---- ec2_parameter.c ---- */

#define PUT_PHASE "put" /* Ec2Progress.phase as long as a payload is under way */

/* Whether a session's payload is to be in a parameter. */
extern bool ec2_uses_parameter(Jsonb *options, bool runtime);

/* The name of a session's parameter, palloc'd; "cluster" is the installation's uuid. */
extern char *ec2_parameter_name(const char *cluster, const char *session_id);

/* Send the payload of the attempt that is under way. */
extern void ec2_put_parameter(Ec2Step *step);

/* Take the answer to that; returns whether the payload is there, else the step has ended. */
extern bool ec2_parameter_is_put(Ec2Step *step);

/* The step's request: take away a parameter, whose name needs no escape in JSON. */
extern void ec2_delete_parameter(Ec2Step *step, const char *name);

/* What came of it: CLASS_NONE also where there was none. */
extern AwsError ec2_parameter_deleted(const HttpReply *reply);

/* Take the parameter away, if there is one: ends the step, done when it is gone for good. */
extern void ec2_drop_parameter(Ec2Step *step);

/* Raise AV010 or AV012 for what would keep a session's payload from being delivered. */
extern void ec2_check_parameter(Jsonb *options);

/* ---- ec2_power.c ---- */

/* Raise AV007 or 0A000 where the session's instance cannot be stopped. */
extern void ec2_check_pause(const ProviderSession *session, Jsonb *options);

/* OP_PAUSE and OP_RESUME. */
extern void ec2_power(Ec2Step *step);

/* ---- ec2_spot.c ---- */

/* Whether a launch in that market is by a persistent request. */
extern bool ec2_is_persistent(Jsonb *options, const char *market);

/* Whether AWS has stopped the first instance in an answer. */
extern bool ec2_was_interrupted(XmlDoc *doc);

/* Take over what an answer tells of the request of the session's instance, if that is persistent. */
extern void ec2_learn_request(Ec2Step *step, XmlDoc *doc);

/* A form that cancels requests (char *). */
extern void ec2_cancel_form(AwsForm *form, List *requests);

/*
 * Before OP_TERMINATE ends an instance: whether no request launches another one in its
 * place, so that what step->reply answers, if anything, is a call of the end itself; else
 * the step has ended.
 */
extern bool ec2_request_is_gone(Ec2Step *step, const char *vm_id);

/*
 * After that, where the instance may have ended before the request was cancelled: the end of
 * those that AWS has launched in its place.  Ends the step, done when none is left.
 */
extern void ec2_end_others(Ec2Step *step);

/* Whether that is under way. */
extern bool ec2_ends_others(const Ec2Progress *progress);

/* ---- ec2_list.c ---- */

/* OP_LIST and OP_REAP. */
extern void ec2_list(Ec2Step *step);
extern void ec2_reap(Ec2Step *step);

/* ---- ec2_check.c ---- */

extern void ec2_check(Ec2Step *step);

#endif /* AGENTVM_PROVIDERS_EC2_H */
